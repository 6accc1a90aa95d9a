"""What a fuzzer is let loose on: functions of bytes, with a corpus, played in every run of the tests.

Each raises what its documentation says of damaged input, and nothing else. ``python -m
tests.hostile.targets NAME --seconds N`` lets atheris look for more.
"""
