import argparse

import pytest

from benchmarks.alignment import ARMS, LONGER, VIT, Budget, Record, budget_of, configure, markdown, part_of
from vir_jax.data import Source, open_source
from vir_jax.runs.validate import validate

GIVEN = argparse.Namespace(
    data="digits", minutes=1.0, pretraining_minutes=2.0, share=0.25, data_dir=None, lr=None
)


def test_every_arm_has_the_same_time():
    step_ms = {"vit": 60.0, "vir": 100.0, "align": 150.0}
    assert budget_of(GIVEN, step_ms) == Budget(scratch=600, longer=1800, alignment=100, aligned=450, vit=2000)


def test_a_part_is_drawn_by_the_seed():
    whole = open_source("digits", "train")
    part, same, other = (part_of(whole, 10, seed) for seed in (0, 0, 1))
    assert isinstance(part, Source)
    assert len(part) == len(whole) // 10
    names = [[some.name(i) for i in range(len(some))] for some in (part, same, other)]
    assert names[0] == names[1] != names[2]
    assert len(set(names[0])) == len(part)
    assert part[3]["label"] == whole.labels[[whole.name(i) for i in range(len(whole))].index(names[0][3])]


def test_recipes_are_made_to_take_so_many_steps():
    for family, layer_scale in (("vit", None), ("vir", 1e-5)):
        config = configure(GIVEN, family, steps=90, examples=144, seed=3)
        validate(config)
        assert round(config.epochs * 144 / config.batch_size) == 90
        assert config.optim.warmup_epochs / config.epochs == pytest.approx(5 / 45)
        assert (config.model.name, config.model.layer_scale) == (f"{family}_pico2", layer_scale)


def test_the_table_has_a_row_for_each_arm():
    records = [
        Record(arm, labels, seed, 10, 0, top1)
        for arm in (VIT, *ARMS)
        for labels, top1s in ((100, (0.5, 0.7)), (10, (0.2, 0.2)))
        for seed, top1 in enumerate(top1s)
    ]
    lines = markdown(GIVEN, records, {"vit": 1.0, "vir": 2.0, "align": 3.0}).splitlines()
    assert f"| {LONGER} | 10 | 60.0 ± 14.1 (2) | 20.0 ± 0.0 (2) |" in lines
    assert lines[2].split(" | ")[2:] == ["top-1 with 100 % of the labels", "top-1 with 10 % of the labels |"]
