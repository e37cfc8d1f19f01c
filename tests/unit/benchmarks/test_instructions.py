"""Counting the instructions of compiled kernels: which loop counts, and where the count ends."""

from __future__ import annotations

from benchmarks.kernels.instructions import _instructions, _sizes, main_loop

LOG = """\
ptxas info    : Compiling entry function '_Z5otherv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_80'
    24 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for _Z6helperv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""

CODE = """\
        Function : _Z5otherv
        /*0000*/                   HMMA.16816.F32 R0, R4, R8, RZ ;
        Function : _Z6kernelv
        /*0000*/                   LDG.E R0, [R2] ;   /* 0x000000ff */
        /*0010*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0020*/                   HMMA.16816.F32.BF16 R0, R4, R8, RZ ;
        /*0030*/             @!PT LDS RZ, [RZ] ;
        /*0040*/              @P1 LDS.64 R6, [R3] ;
        /*0050*/              @P0 BRA 0x10 ;
        /*0060*/                   VOTE.ANY R1, PT, P0 ;
        /*0070*/                   LDL R1, [R1] ;
        /*0080*/              @P0 BRA 0x0 ;
        /*0090*/                   EXIT ;
"""


def test_the_shortest_loop_with_all_products_counts():
    code = list(_instructions(CODE, "_Z6kernelv"))
    assert main_loop(code) == {"LDSM": 1, "HMMA": 1, "LDS": 1, "BRA": 1}


def test_a_vote_ends_the_count():
    code = [each for each in _instructions(CODE, "_Z6kernelv") if each.target != 0x10]
    assert main_loop(code) == {"LDG": 1, "LDSM": 1, "HMMA": 1, "LDS": 1, "VOTE": 1}


def test_a_kernel_without_a_loop_has_no_count():
    assert main_loop(list(_instructions(CODE, "_Z5otherv"))) == {}


def test_registers_and_spills_are_the_kernels_own():
    assert dict(_sizes(LOG.splitlines())) == {"_Z5otherv": (20, 0), "_Z6kernelv": (168, 20)}
