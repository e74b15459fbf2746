"""Progress on a standard error that is no terminal."""

import pytest

from contrec_fast.progress import ProgressBars


@pytest.mark.parametrize("total, lines", [(1, 1), (7, 7), (25, 13), (1000, 10)])
def test_every_stage_prints_a_few_lines_and_its_end(capsys, total, lines):
    with ProgressBars() as progress:
        advance = progress.stage("Stage", total, "epochs")
        for _ in range(total):
            advance()
        progress.say("a line of x[/y]")  # no markup: folders may have such names
    printed = capsys.readouterr()
    shown = printed.err.splitlines()
    assert printed.out == "" and len(shown) == lines + 1
    assert shown[-2:] == [f"Stage {total}/{total} epochs", "a line of x[/y]"]


def test_figures_have_their_units_and_stay_until_there_are_others(capsys):
    with ProgressBars() as progress:
        advance = progress.stage("Stage", 5, "steps", done=2)
        advance(epoch=2, diffusion=1.25, rate=1234.5, learning_rate=0.002)
        advance()
        advance(**{"ndcg@10": 0.1})
    assert capsys.readouterr().err.splitlines() == [
        "Stage 3/5 steps  epoch 2  diffusion 1.250  1,234 users/s  learning rate 2.0e-03",
        "Stage 4/5 steps  epoch 2  diffusion 1.250  1,234 users/s  learning rate 2.0e-03",
        "Stage 5/5 steps  ndcg@10 0.100",
    ]
