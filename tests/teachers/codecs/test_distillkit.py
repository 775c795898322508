"""DistillKit's columns: its documented sizes and fits, and every setting there and back."""

import numpy as np
import pytest
import torch

from tests.teachers.codecs.made import distributions, size, through
from vpmoe.config import ConfigError, validate
from vpmoe.errors import DataError
from vpmoe.teachers.codecs import Entries
from vpmoe.teachers.codecs.base import tail_of
from vpmoe.teachers.codecs.distillkit import Bin, DistillKitConfig

TEACHER = distributions(16)
BUDGET = DistillKitConfig(k=50, exact_k=1, polynomial_terms=(0, 1, "sqrt"))


@pytest.mark.parametrize(
    ("config", "num_bytes"),
    [
        (DistillKitConfig(), 344),
        (BUDGET, 127),
        (DistillKitConfig(k=32, exact_k=32, polynomial_terms=()), 136),
        (DistillKitConfig(k=64, exact_k=64), 272),
        (DistillKitConfig(k=128, exact_k=128), 544),
    ],
)
def test_documented_bytes(config, num_bytes):
    codec = config.build()
    assert size(codec, TEACHER.top(codec.asked)) == num_bytes + 2


@pytest.mark.parametrize(
    ("terms", "coefficients", "fit"),
    [
        (
            (0, 1, "sqrt"),
            [-1.989425, -0.260016, -1.310180],
            [-1.989425, -3.559621, -4.362332, -5.038772, -5.649850],
        ),
        ((0, 1, 2), [-2.045714, -1.508571, 0.157143], None),
    ],
)
def test_worked_fit(terms, coefficients, fit):
    values = torch.tensor([[-0.2, -2, -3.5, -4.4, -5.1, -5.6]])
    top = Entries(torch.arange(6)[None], values, tail_of(values))
    config = DistillKitConfig(k=6, exact_k=1, exact_dtype="float32", polynomial_terms=terms)
    columns = config.build().encode(top, torch.tensor([1]))
    row = columns["compressed_logprobs"].data.numpy().tobytes()
    assert np.frombuffer(row, "<f4")[0] == np.float32(-0.2)
    np.testing.assert_allclose(np.frombuffer(row, "<f4")[1:], coefficients, atol=2e-5)
    if fit:
        out = through(config.build(), top)
        # The fit adds up to more than one; reading brings the sum down to it.
        raw = torch.tensor([-0.2, *fit])
        torch.testing.assert_close(
            out.logprobs[0], raw - raw.logsumexp(0).clamp_min(0), atol=1e-4, rtol=0
        )


def test_bytes_laid_out_by_hand_are_read():
    """Exact values, coefficients, one bin of three bits; ids of 18 bits, highest bit first."""
    config = DistillKitConfig(
        k=4,
        exact_k=1,
        exact_dtype="float16",
        polynomial_terms=(0, 1),
        residual_bins=(Bin(scale_dtype="float32", element_bits=3, num_elements=2),),
    )
    row = np.array([-0.5], "<f2").tobytes() + np.array([-3, -1], "<f4").tobytes()
    row += np.array([0.25], "<f4").tobytes() + bytes([0b110_001_00])  # codes 6, 1: +2 and -3
    ids = "".join(f"{i:018b}" for i in (200_006, 1, 131_072, 5))
    packed = int(ids, 2).to_bytes(9, "big")
    columns = {
        "compressed_logprobs": torch.frombuffer(bytearray(row), dtype=torch.uint8),
        "bytepacked_indices": torch.frombuffer(bytearray(packed), dtype=torch.uint8),
    }
    out = config.build().decode(columns, torch.tensor([1]))
    assert out.ids.tolist() == [[200_006, 1, 131_072, 5]]
    expected = torch.tensor([[-0.5, -3 + 0.5, -4 - 0.75, -5.0]])
    torch.testing.assert_close(out.logprobs, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("binned", [False, True])
@pytest.mark.parametrize("exact", [0, 1, 40])
def test_what_was_written_is_read(delta, binned, exact):
    """Ids are theirs, in their order; a bin of 12 bits over all ranks leaves little error."""
    bins = (Bin(element_bits=12, num_elements=max(1, 40 - exact), scale_dtype="float32"),)
    config = DistillKitConfig(
        k=40,
        exact_k=exact,
        exact_dtype="float32",
        delta_encoding=delta,
        residual_bins=bins if binned and exact < 40 else (),
        polynomial_terms=(0, 1, "exp"),
        normalize_t=True,
    )
    top = TEACHER.top(40)
    out = through(config.build(), top)
    assert torch.equal(out.ids, top.ids)
    assert (out.logprobs.diff(dim=1) <= 0).all()
    assert (out.logprobs.double().exp().sum(1) <= 1 + 1e-6).all()
    if exact == 40 or binned:
        tolerance = 2e-5 if exact == 40 else 0.15 if delta else 0.01
        torch.testing.assert_close(out.logprobs, top.logprobs, atol=tolerance, rtol=0)


def test_the_documented_fit_is_ill_conditioned_in_float32():
    """What spec/anchors.md, section 0, measures: nats of error, and hundredths when normalised."""
    top = TEACHER.top(128)
    error = {}
    for name, changes in {
        "published": {},
        "normalized": {"normalize_t": True},
        "float64": {"fit_dtype": "float64", "term_dtype": "float64"},
    }.items():
        out = through(DistillKitConfig(monotone=False, **changes).build(), top)
        error[name] = (out.logprobs - top.logprobs)[:, 16:].abs().mean().item()
    assert error["published"] > 0.3
    assert error["normalized"] < 0.1 and error["float64"] < 0.1


def test_settings_that_mean_nothing_are_refused():
    for changes, message in (
        ({"exact_k": 200}, "exact_k is above k"),
        ({"polynomial_terms": []}, "give polynomial_terms"),
        ({"residual_bins": [{"element_bits": 2, "num_elements": 200}]}, "more ranks"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(DistillKitConfig, changes, source="test")


def test_bytes_that_are_no_codes_are_refused():
    codec, places = BUDGET.build(), torch.tensor([16])
    columns = {n: c.data for n, c in codec.encode(TEACHER.top(50), places).items()}
    for name, column in columns.items():
        with pytest.raises(DataError, match=f"bytes of {name}"):
            codec.decode({**columns, name: column[:-1]}, places)
    with pytest.raises(DataError, match="outside the vocabulary"):
        codec.decode({**columns, "bytepacked_indices": columns["bytepacked_indices"] | 255}, places)
    with pytest.raises(DataError, match="not a number"):
        bad = columns["compressed_logprobs"] | 255
        codec.decode({**columns, "compressed_logprobs": bad}, places)
