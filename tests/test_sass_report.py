"""The report on the compiled CUDA kernels, on what cuobjdump prints (shortened)."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from build_support.sass import missing, parse  # noqa: E402

_OF = "_ZN8mac_attn4cuda12%s_kernelINS_4%sEvNS_11%sParamsENS0_14%sWorkspaceE"
MATCH = _OF % ("match", "bf16ELi128ELb1EE", "Match", "Match")
_AMEND = _OF % ("amend", "fp16ELi256ELi2E%sLb%dEE", "Amend", "Amend")
AMEND, AMEND_FP8 = _AMEND % ("S2_", 1), _AMEND % ("NS_3fp8E", 0)
USAGE = f"""
Fatbin elf code:
================
arch = sm_80
code version = [1,7]

Resource usage:
 Common:
  GLOBAL:0
 Function {AMEND}:
  REG:252 STACK:0 SHARED:6656 LOCAL:0 CONSTANT[0]:768 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {MATCH}:
  REG:78 STACK:0 SHARED:2688 LOCAL:0 CONSTANT[0]:768 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN5other6kernelEv:
  REG:9 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:352 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = f"""
\tcode for sm_80
\t\tFunction : {AMEND}
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000ff00000000800 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R5], desc[UR8][R2.64] ;  /* 0x0a7fae */
        /*0020*/                   LDSM.16.M88.4 R4, [R8] ;            /* 0x000000000804783b */
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;    /* 0x0000000c0804723c */
        /*0040*/               @P1 BRA 0x10 ;                          /* 0xfffffffc00087947 */
        /*0050*/                   EXIT ;                              /* 0x000000000000794d */
\t\tFunction : {MATCH}
        /*0000*/                   LDG.E.128.NA.STRONG R4, desc[UR8][R2.64] ; /* 0x0000000802047 */
        /*0010*/                   EXIT ;                              /* 0x000000000000794d */
"""


def test_what_is_read():
    amend, match = parse(USAGE, SASS)
    assert (amend.name, amend.arch) == ("amend fp16 256, 16 heads", "sm_80")
    assert (amend.registers, amend.static_shared, amend.spilled) == (252, 6656, 0)
    assert amend.main_loop() == ["LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "HMMA.16816.F32", "BRA"]
    assert len(amend.opcodes) == 6
    # Two stages of 4 x (16 + 16) rows of 256 elements; 16 padded rows of each query; 2 bytes each.
    assert amend.dynamic_shared == (2 * 128 * 256 + 2 * 16 * 264) * 2
    assert amend.ctas == 1
    assert (match.name, match.count("LDG")) == ("match bf16 128", 1)
    fp8, _ = parse(USAGE.replace(AMEND, AMEND_FP8), SASS.replace(AMEND, AMEND_FP8))
    assert fp8.name == "amend fp16 fp8 up to 256, 16 heads" and fp8.main_loop() == amend.main_loop()
    assert fp8.dynamic_shared == 3 * 128 * 256 + 2 * 16 * 264 * 2  # three stages of half the bytes
    # 78 registers are 80 a thread: 3 x 256 threads; shared memory has room for more.
    assert match.ctas == 3
    assert not [*amend.complaints(), *match.complaints()]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("REG:78 STACK:0", "REG:78 STACK:16", "match bf16 128 (sm_80): 16 bytes in local memory"),
        ("LDSM.16.M88.4 R4, [R8]", "LDL R4, [R1]", "amend fp16 256, 16 heads (sm_80): 0 bytes in"),
        ("LDSM.16.M88.4 R4, [R8]", "QSPC.E.S P0, RZ, [R8]", "an atomic on any kind of memory"),
        ("LDG.E.128.NA", "LDG.E.64.NA", "match bf16 128 (sm_80): no 16-byte loads"),
        ("LDGSTS.E.BYPASS.128", "LDGSTS.E.64", "no 16-byte asynchronous copies in the main loop"),
        ("HMMA.16816.F32 R4", "FFMA R4", "no tensor-core instructions in the main loop"),
        # The loop no longer goes round the copy.
        ("BRA 0x10", "BRA 0x20", "no 16-byte asynchronous copies in the main loop"),
    ],
)
def test_complaints(old, new, complaint):
    kernels = parse(USAGE.replace(old, new), SASS.replace(old, new))
    complaints = [c for kernel in kernels for c in kernel.complaints()]
    assert any(complaint in c for c in complaints), complaints


def test_no_kernel_goes_unseen():
    with pytest.raises(ValueError, match="other_kernel.* is no kernel that"):
        parse(USAGE.replace("match_kernel", "other_kernel"), SASS)
    absent = missing(parse(USAGE, SASS))
    assert len(absent) == 114 - 2
    assert "match bf16 64 (sm_80) is missing" in absent
    assert "match bf16 128 (sm_80) is missing" not in absent
    assert "unrotate fp16 (sm_80) is missing" in absent
