"""What setup.py needs and tests/test_build.py tests."""
