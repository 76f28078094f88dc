"""What all tests share."""

from hypothesis import settings

# Two noisy cores: a deadline would say more of the machine than of the code.
settings.register_profile("qmpblock", deadline=None)
settings.load_profile("qmpblock")
