import signal

from hypothesis import settings

# the shell starts jobs in the background with Ctrl-C ignored, and what a test starts would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=20_000)  # make fuzz
settings.load_profile("default")
