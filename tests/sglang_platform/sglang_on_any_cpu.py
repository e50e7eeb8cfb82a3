"""A platform for SGLang's own plugin interface: any CPU, with torch's operations.

SGLang's path for CPUs needs a package of kernels that the package index has only for CUDA. A
platform of its plugin interface gets the torch implementation of every operation instead, and
everything else of SGLang as it is: server, scheduler, pools, radix cache, model runner, layers.
"""

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class AnyCpu(CpuDeviceMixin, SRTPlatform):
    """The CPU, as a platform that is not SGLang's."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        """The one of torch's operations."""
        return "torch_native"


def activate() -> str:
    """The entry point of the group `sglang.srt.platforms`."""
    return f"{__name__}.{AnyCpu.__name__}"
