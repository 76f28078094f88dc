"""What all tests share."""

import signal

from hypothesis import settings

# A shell's background job ignores SIGINT, and hands that on: programs that tests interrupt would
# never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two noisy cores: a deadline would say more of the machine than of the code.
settings.register_profile("qmpblock", deadline=None)
settings.load_profile("qmpblock")
