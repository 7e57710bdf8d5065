"""Other libraries, each behind ``benchmarks.contestants.Wrap``: it puts a method on a model.

They are imported when first used, so that suites can be listed without them. To install them:

    python -m pip install -c constraints.txt -r benchmarks/peers/requirements.txt
"""
