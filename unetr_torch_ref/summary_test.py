import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from unetr_torch_ref import UNETR, summarize
from unetr_torch_ref.__main__ import main

MODEL_HEAD = """\
        Layer (type)               Output Shape         Param #
================================================================
            Conv3d-1         [-1, 768, 8, 8, 8]       3,146,496
           Dropout-2             [-1, 512, 768]               0
        Embeddings-3             [-1, 512, 768]               0
         LayerNorm-4             [-1, 512, 768]           1,536
            Linear-5            [-1, 512, 2304]       1,771,776
           Dropout-6          [-1, 8, 512, 512]               0
            Linear-7             [-1, 512, 768]         590,592
MultiHeadAttention-8             [-1, 512, 768]               0
           PreNorm-9             [-1, 512, 768]               0
        LayerNorm-10             [-1, 512, 768]           1,536
           Linear-11            [-1, 512, 3072]       2,362,368
             GELU-12            [-1, 512, 3072]               0
"""

MODEL_TAIL = """\
     BatchNorm3d-251    [-1, 16, 128, 128, 128]              32
            ReLU-252    [-1, 16, 128, 128, 128]               0
     Conv3DBlock-253    [-1, 16, 128, 128, 128]               0
          Conv3d-254     [-1, 4, 128, 128, 128]              68
SingleConv3DBlock-255     [-1, 4, 128, 128, 128]               0
================================================================
Total params: 92,065,812
Trainable params: 92,065,812
Non-trainable params: 0
Not in a row: embedding.position_embeddings 393,216
Params in all: 92,459,028
----------------------------------------------------------------
Input size (MB): 8.00
Forward/backward pass size (MB): 7376.00
Params size (MB): 351.20
Estimated Total Size (MB): 7735.20
----------------------------------------------------------------
"""

TRANSFORMER_HEAD = """\
         LayerNorm-1            [-1, 2744, 768]           1,536
            Linear-2           [-1, 2744, 2304]       1,771,776
           Dropout-3        [-1, 8, 2744, 2744]               0
            Linear-4            [-1, 2744, 768]         590,592
"""

TRANSFORMER_TAIL = """\
MultiHeadAttention-137            [-1, 2744, 768]               0
         PreNorm-138            [-1, 2744, 768]               0
       LayerNorm-139            [-1, 2744, 768]           1,536
          Linear-140           [-1, 2744, 3072]       2,362,368
            GELU-141           [-1, 2744, 3072]               0
         Dropout-142           [-1, 2744, 3072]               0
          Linear-143            [-1, 2744, 768]       2,360,064
         PreNorm-144            [-1, 2744, 768]               0
================================================================
Total params: 85,054,464
Trainable params: 85,054,464
Non-trainable params: 0
Params in all: 85,054,464
----------------------------------------------------------------
Input size (MB): 8.04
Forward/backward pass size (MB): 9759.42
Params size (MB): 324.46
Estimated Total Size (MB): 10091.92
----------------------------------------------------------------
"""


def rows(printed):
    return printed.split("=" * 64)[1].strip("\n").splitlines()


def test_command_prints_the_table_of_the_article():
    done = subprocess.run(
        [sys.executable, "-m", "unetr_torch_ref", "summary"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.removeprefix("-" * 64 + "\n").startswith(MODEL_HEAD)
    assert done.stdout.endswith(MODEL_TAIL)
    assert len(rows(done.stdout)) == 255


def test_table_of_the_transformer(capsys):
    main(["summary", "--part", "transformer", "--img-size", "224"])
    printed = capsys.readouterr().out
    assert TRANSFORMER_HEAD in printed
    assert printed.endswith(TRANSFORMER_TAIL)
    assert len(rows(printed)) == 144


def test_options_reach_the_model(capsys):
    sizes = "--img-size 16 8 6 --patch-size 8 4 2 --in-channels 2 --out-channels 5 --light-r 8"
    main(["summary", *sizes.split(), "--num-heads", "3", "--embed-dim", "24"])
    table = [line.split() for line in rows(capsys.readouterr().out)]
    assert table[0] == ["Conv3d-1", "[-1,", "24,", "2,", "2,", "3]", f"{24 * (2 * 64 + 1):,}"]
    assert table[5] == ["Dropout-6", "[-1,", "3,", "12,", "12]", "0"]
    # Width 64 / light_r = 8 in, 5 out.
    assert table[-2] == ["Conv3d-254", "[-1,", "5,", "16,", "8,", "6]", f"{5 * (8 + 1)}"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--img-size 100", "img_shape=(100, 100, 100)"),
        ("--img-size 96 96", "img_shape=(96, 96)"),
        ("--img-size 65536", "sizes must be smaller"),
        ("--in-channels 0", "argument --in-channels: 0: must be an integer from 1 to 1048576"),
        ("--out-channels x", "argument --out-channels: x: must be an integer"),
        ("--patch-size 3", "patch_size=(3, 3, 3): each must be one of (1, 2, 4, 8, 16)"),
        ("--light-r nan", "argument --light-r: nan: must be a number from"),
        ("--light-r 3", "light_r=3.0"),
        ("--num-heads 7", "num_heads=7: must divide the embedding size 768"),
        ("--part decoder", "--part: invalid choice: 'decoder'"),
    ],
)
def test_bad_values_exit_with_2_and_one_line(options, named, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["summary", *options.split()])
    printed = capsys.readouterr()
    assert exit_info.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert named in printed.err


def test_lists_count_no_numbers_and_parameters_without_a_row_are_named():
    with torch.device("meta"):
        model = UNETR((16, 32, 16), 1, 2, embed_dim=8, num_heads=2, light_r=8)
    summary = summarize(model, (1, 16, 32, 16))
    (row,) = (r for r in summary.rows if r.name.startswith("TransformerBlock"))
    assert row.name == "TransformerBlock-148"
    assert row.output_shape == [[-1, 2, 8]] * 4
    assert row.numbers == 0
    assert summary.uncounted == {"embedding.position_embeddings": 16}
    assert summary.all_params == sum(p.numel() for p in model.parameters())


def test_frozen_parameters_are_not_trainable_and_the_module_stays_as_it_was():
    module = nn.Sequential(nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3)).train()
    module[0].requires_grad_(False)
    summary = summarize(module, (2, 4, 5, 6))
    assert [(r.name, r.params, r.trainable) for r in summary.rows] == [
        ("Conv3d-1", 9, 0),
        ("BatchNorm3d-2", 6, 6),
    ]
    assert "Trainable params: 6\nNon-trainable params: 9\n" in str(summary)
    assert module.training
    assert module[1].num_batches_tracked == 0
    assert not module[0]._forward_hooks
