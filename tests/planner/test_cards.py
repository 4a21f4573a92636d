"""Cards by the names that people and drivers give them."""

from __future__ import annotations

import pytest

from nybble.errors import UserError
from nybble.planner.cards import GIB, card, card_of_device, card_of_memory


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("h100", "H100"),
        ("NVIDIA H100 80GB", "H100"),
        ("rtx 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("l40s", "L40S"),
        ("a100", "A100"),
        ("a100 40gb", "A100 40GB"),
        ("A100-40GB", "A100 40GB"),
        ("3060", "RTX 3060 12GB"),
        ("4060 ti", "RTX 4060 Ti 16GB"),
        ("4070 ti super", "RTX 4070"),
    ],
)
def test_as_people_write_them(name: str, found: str) -> None:
    assert card(name).name == found


@pytest.mark.parametrize("name", ["h10", "rtx 4090 laptop", "l400", "a4", "rtx"])
def test_others_are_not_known(name: str) -> None:
    with pytest.raises(UserError, match="no card is known as"):
        card(name)


def test_the_nearest_name_is_said() -> None:
    with pytest.raises(UserError, match="Did you mean 'h100'"):
        card("h10")


# As torch.cuda.get_device_properties names them.
@pytest.mark.parametrize(
    ("product", "gib", "capability", "like"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, (9, 0), "H100"),
        ("NVIDIA H100 PCIe", 79.2, (9, 0), "H100"),
        ("NVIDIA H200", 139.8, (9, 0), "H200"),
        ("NVIDIA A100-SXM4-80GB", 79.1, (8, 0), "A100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, (8, 0), "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", 39.4, (8, 0), "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", 79.1, (8, 0), "A100"),
        ("NVIDIA L4", 22.0, (8, 9), "L4"),
        ("NVIDIA L40", 44.4, (8, 9), "L40"),
        ("NVIDIA L40S", 44.4, (8, 9), "L40S"),
        ("NVIDIA A40", 44.4, (8, 6), "A40"),
        ("NVIDIA A10", 22.1, (8, 6), "A10"),
        ("NVIDIA RTX A6000", 47.4, (8, 6), "A6000"),
        ("NVIDIA RTX 6000 Ada Generation", 47.4, (8, 9), "6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 94.9, (12, 0), "PRO 6000 Blackwell"),
        ("Tesla T4", 14.6, (7, 5), "T4"),
        ("Tesla V100-SXM2-16GB", 15.8, (7, 0), "V100"),
        ("NVIDIA GeForce RTX 3060", 11.6, (8, 6), "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 7.6, (8, 9), "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4090", 23.5, (8, 9), "RTX 4090"),
    ],
)
def test_as_drivers_name_them(product: str, gib: float, capability: tuple[int, int], like: str) -> None:
    found = card_of_device(product, int(gib * GIB), capability)
    assert (found.name, found.memory_bytes, found.capability) == (product, int(gib * GIB), capability)
    assert found.bf16_flops == card(like).bf16_flops


@pytest.mark.parametrize(
    ("product", "gib", "capability", "unlike"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, (8, 9), "RTX 4090"),
        ("NVIDIA GeForce RTX 3080 with Max-Q Design", 7.6, (8, 6), "RTX 3080"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.6, (9, 0), "H100"),
        ("NVIDIA GH200 480GB", 94.5, (9, 0), "H200"),
        ("NVIDIA RTX A4000", 15.7, (8, 6), "A40"),
        ("NVIDIA A10G", 22.1, (8, 6), "A10"),
        ("Quadro RTX 6000", 22.2, (7, 5), "6000 Ada"),
    ],
)
def test_other_cards_are_as_slow_as_one_of_their_size(
    product: str, gib: float, capability: tuple[int, int], unlike: str
) -> None:
    found = card_of_device(product, int(gib * GIB), capability)
    assert found.bf16_flops != card(unlike).bf16_flops
    assert found.memory_bytes == int(gib * GIB)


def test_by_memory_alone_no_speed_is_promised_in_vain() -> None:
    assert card_of_memory(24 * GIB).memory_bytes == 24 * GIB
    assert card_of_memory(24 * GIB).bf16_flops <= card("rtx 3090").bf16_flops
