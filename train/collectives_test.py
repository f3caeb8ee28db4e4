from train.collectives import collectives, gathered_volumes

PROGRAM = """
  %a = f64[1,32,8]{2,0,1} all-gather(%x), channel_id=1, replica_groups=[1,2]<=[2], dimensions={1}
  %b = (bf16[2,4,4]{2,1,0}, bf16[2,8,4]{2,1,0:T(8,128)}) all-gather-start(%y), dimensions={1}
  %c = f32[3,3,3,16,32]{4,3,2,1,0} all-gather(%p), dimensions={4}
  ROOT %d = f32[2,1,16,16,4]{4,3,2,1,0} collective-permute(%z), source_target_pairs={{0,1}}
"""


def test_collectives_are_read_from_a_program():
    assert collectives(PROGRAM, "collective-permute") == [(2, 1, 16, 16, 4)]
    assert collectives(PROGRAM, "all-to-all") == []
    found = [(1, 32, 8), (2, 4, 4), (2, 8, 4), (3, 3, 3, 16, 32)]
    assert collectives(PROGRAM, "all-gather") == found
    assert gathered_volumes(PROGRAM, 256, ()) == [(3, 3, 3, 16, 32)]
    assert gathered_volumes(PROGRAM, 255, {(3, 3, 3, 16, 32)}) == [(1, 32, 8)]
