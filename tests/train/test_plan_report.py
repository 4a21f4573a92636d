"""What `nybble plan` is answered."""

from __future__ import annotations

from typing import Any

import pytest

from nybble.config import RunConfig
from nybble.planner.cards import GIB, card
from nybble.planner.report import Report
from nybble.train.plan import Rows, plan_run
from nybble.train.plan_report import plan_report
from tests.train.test_plan import EIGHT_B, config_of

H100 = card("h100")


def report_of(memory_gib: float = 80, **changes: Any) -> tuple[Report, RunConfig]:
    config = config_of(**{"data.max_length": 2048} | changes)
    return plan_report(config, EIGHT_B, H100.with_memory(int(memory_gib * GIB))), config


def test_a_faster_split_is_planned_as_the_run_would_be() -> None:
    report, config = report_of(16, **{"train.batch_size": 16, "memory.weights": "resident"})
    split = report.split
    assert split is not None
    assert split.fits
    settings = {"train.batch_size": split.run.batch, "train.gradient_accumulation": split.run.accumulation}
    alone = plan_run(config.changed(settings), EIGHT_B, report.card, rows=Rows(2048)).solution
    assert split == alone
    assert split.budget_bytes == 16 * GIB


def test_a_head_in_nf4_stays_on_the_device_at_the_least_too() -> None:
    report, _ = report_of(**{"model.head": "nf4"})
    assert report.advice is not None
    for option in report.advice.options.values():
        assert (option.least.plan.embedding, option.least.plan.head) == ("host", "device")


@pytest.mark.parametrize(
    "trained", [{"lora.modules_to_save": ["lm_head"]}, {"lora.target_modules": ["lm_head", "o_proj"]}]
)
def test_so_do_ends_that_are_trained(trained: dict[str, Any]) -> None:
    report, _ = report_of(**trained)
    assert report.advice is not None
    for option in report.advice.options.values():
        assert (option.least.plan.embedding, option.least.plan.head) == ("device", "device")


def test_the_other_method_is_advised_with_weights_as_it_holds_them() -> None:
    report, config = report_of(**{"method": "lora", "model.storage": "bf16"})
    assert report.advice is not None
    assert report.advice.options["lora"].here == report.solution
    qlora = config.changed({"method": "qlora", "model.storage": "auto"})
    alone = plan_run(qlora, EIGHT_B, report.card, rows=Rows(2048)).solution
    assert report.advice.options["qlora"].here == alone


def test_full_fine_tuning_is_advised_against_nothing() -> None:
    report, _ = report_of(method="full")
    assert report.advice is None
    assert report.trained == report.total


def test_a_model_in_4_bit_has_nothing_to_choose() -> None:
    report = plan_report(config_of(), EIGHT_B | {"quantization_config": {"quant_method": "bitsandbytes"}}, H100)
    assert report.advice is None
