"""The modules that replace stock ones, and the small pieces they are built from.

``layer`` sees any weight-bearing layer as one matrix; ``fused`` is the autograd function that runs a dense
layer and its low-rank update together; ``delta`` is what an adapter adds to a layer; ``adapted`` hosts
adapters on a layer; ``copied`` hosts trained copies of whole modules; ``replacement`` is their base class.
"""
