"""Products that read less than the whole matrix are the whole products."""

import pytest
import torch

from hf_recontrol.control.products import Active, Followed, of_few


def some(rows: int, units: int, share: float, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    """Numbers of which about so many are not zero."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rows, units, dtype=dtype, generator=generator)
    return numbers * (torch.rand(rows, units, generator=generator) < share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_rows_of_few_units_sum_to_the_product(dtype, rows, share, threads):
    matrix, left = some(60, 60, 1.0, dtype), some(rows, 60, share, dtype, seed=1)
    left[-1, 5] = 1.0  # there is one at least; whole rows of zeros before it
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = of_few(matrix, left, *left.nonzero(as_tuple=True))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, left @ matrix)


# The units that are not zero: the same, a few others, all others, none, all.
CHANGES = [0.5, 0.5, 0.55, 0.45, 0.05, 0.0, 1.0, 0.95, 0.1, 0.5]


@pytest.mark.parametrize("make", [Active, Followed])
@pytest.mark.parametrize("keeps_places", [True, False])
def test_one_row_after_another_is_multiplied_whatever_changes(make, keeps_places):
    matrix = some(80, 30, 1.0)
    times = make(matrix)
    for number, share in enumerate(CHANGES):
        # Of one seed, places of a larger share hold those of a smaller one.
        places = some(1, 80, share, seed=0 if keeps_places else number) != 0
        left = some(1, 80, 1.0, seed=100 + number) * places
        torch.testing.assert_close(times(left), left @ matrix)


def test_a_number_that_is_none_is_not_lost():
    matrix = some(80, 30, 1.0)
    times, left = Active(matrix), some(1, 80, 0.5)
    times(left)
    left[0, (left[0] == 0).nonzero()[0, 0]] = torch.nan
    assert times(left).isnan().all()
