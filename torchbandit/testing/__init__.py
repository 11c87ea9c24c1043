"""For tests, yours as well as ours: the contract of an environment, and a guard against copies to the host."""

from torchbandit.testing.contract import check_env
from torchbandit.testing.host_copy import no_host_copy

__all__ = ["check_env", "no_host_copy"]
