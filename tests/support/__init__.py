"""What tests of pyblock share: helpers, models and samples that know it.

tests/kit is apart, for it knows nothing of pyblock: so it can be the judge.
"""
