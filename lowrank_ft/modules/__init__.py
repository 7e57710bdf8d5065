"""The modules that replace stock ones, and the small pieces they are built from.

``layer`` presents any layer with a weight as one matrix. ``fused`` is the autograd function that runs a
frozen layer and its low-rank update together. ``delta`` is the update that an adapter adds to a layer;
``adapted`` hosts adapters on a layer, ``copied`` hosts trained copies of whole modules. ``lowrank``,
``tucker``, ``resized``, ``attention`` and ``quantized`` are compressed modules. The base classes are in
:mod:`lowrank_ft.structure.replacement`.
"""
