def activate():
    return "sglang_cpu_platform.CpuPlatform"
