"""Decoding on the GPU against float64 and the reference: kernels, steps, whole completions."""

import numpy as np
import pytest
import torch

from tests.kernels.common import BF16, needs_gpu, relative_error
from tests.kernels.test_fused import config_of
from vpmoe.errors import ConfigError
from vpmoe.head import token_logprobs
from vpmoe.models.attention.tpa import Tpa, TpaConfig
from vpmoe.models.decode import ReferenceDecoder
from vpmoe.models.positions import GrapeAConfig
from vpmoe.models.student import build_student
from vpmoe.rollouts.draw import Draw, choose, stream_of, uniforms
from vpmoe.rollouts.sampler import Sampler


def randn(*shape, dtype=torch.bfloat16, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).cuda().to(dtype)


class TestKernels:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("rows", [1, 7, 64, 100])
    @pytest.mark.parametrize("columns", [5, 1064])
    @pytest.mark.parametrize("dim", [192, 896])  # few tiles of 64, many of 128
    def test_linear(self, rows, columns, dim):
        from vpmoe.kernels.decode import linear

        x, weight = randn(rows, dim), randn(columns, dim, seed=1)
        bias, residual = randn(columns, seed=2), randn(rows, columns, seed=3)
        expected = x.double() @ weight.double().T
        exact = torch.empty(rows, columns, device="cuda")
        linear(x, weight, None, exact)
        assert relative_error(exact, expected) < 1e-5
        out = residual.clone()
        linear(x, weight, bias, out, residual=out)
        assert relative_error(out, expected + bias.double() + residual.double()) < BF16

    def test_norm_takes_the_parts_in(self):
        from vpmoe.kernels.decode import normalise

        stream, parts, gamma = randn(9, 320), randn(9, 5, 320, seed=1), randn(320, seed=2)
        expected = stream.double() + parts.double().sum(1)
        out = torch.empty_like(stream)
        normalise(stream, gamma, parts, out, eps=1e-6)
        assert relative_error(stream, expected) < BF16
        scale = (expected.square().mean(1, keepdim=True) + 1e-6).rsqrt()
        assert relative_error(out, expected * scale * gamma.double()) < BF16

    @pytest.mark.parametrize(
        ("rows", "hot"), [(1, False), (64, False), (50, True), (100, True), (256, False)]
    )
    @pytest.mark.parametrize(
        ("experts", "width", "wide", "dim"), [(32, 64, 96, 256), (8, 128, 512, 896)]
    )
    def test_experts(self, rows, hot, experts, width, wide, dim):
        from vpmoe.kernels.decode_experts import Network, num_parts, run_experts

        chosen = 4
        x = randn(rows, dim)
        routed = Network(
            randn(experts, width, dim, scale=dim**-0.5, seed=1),
            randn(experts, width, seed=2),
            randn(experts, dim, width, scale=width**-0.5, seed=3),
            randn(experts, dim, seed=4),
        )
        shared = Network(
            randn(wide, dim, scale=dim**-0.5, seed=5),
            randn(wide, seed=6),
            randn(dim, wide, scale=wide**-0.5, seed=7),
            randn(dim, seed=8),
        )
        ids = randn(rows, experts, seed=9).argsort(dim=1)[:, :chosen].int()
        if hot:  # every token at one expert, most experts empty
            ids = torch.arange(chosen, device="cuda", dtype=torch.int32).expand(rows, -1)
        weights = randn(rows, chosen, seed=10, dtype=torch.float32).abs()
        share = torch.tensor(0.5, device="cuda")
        parts = randn(rows, num_parts(width, wide, chosen=chosen), dim, seed=11)
        run_experts(x, ids.contiguous(), weights, routed, shared, share, parts)

        def network(net, inputs):
            up, up_bias, down, down_bias = (t.double() for t in net)
            return (inputs @ up.mT + up_bias).relu().square() @ down.mT + down_bias

        expected = 0.5 * network(shared, x.double())
        for slot in range(chosen):
            picked = Network(*(t[ids[:, slot].long()] for t in routed))
            picked = picked._replace(
                up_bias=picked.up_bias[:, None], down_bias=picked.down_bias[:, None]
            )
            one = network(picked, x.double()[:, None])[:, 0]
            expected += weights[:, slot, None].double() * one
        assert relative_error(parts.double().sum(1), expected) < BF16

    @pytest.mark.parametrize(
        ("num_heads", "kv_heads", "dim", "window", "slots"),
        [
            (8, 2, 64, None, 300),
            (8, 2, 128, 128, 128),
            (8, 2, 128, None, 300),
            (6, 2, 32, 40, 40),
            (8, 2, 256, None, 300),
            (64, 1, 128, None, 300),
            (64, 1, 256, None, 300),
        ],
    )
    def test_attention(self, num_heads, kv_heads, dim, window, slots):
        from vpmoe.kernels.decode_attention import Heads, attend_cached

        places = torch.tensor([0, 1, 77, 128, 299], device="cuda")
        rows, group = len(places), num_heads // kv_heads
        projected = randn(rows, (num_heads + 2 * kv_heads) * dim)
        keys, values = (randn(rows, slots, kv_heads, dim, seed=seed) for seed in (1, 2))
        gammas = (randn(dim, seed=3), randn(dim, seed=4))
        sinks = randn(num_heads, seed=5, dtype=torch.float32)
        slopes = randn(num_heads, seed=6, dtype=torch.float32).abs() / 50
        out, kept = randn(rows, num_heads * dim, seed=7), randn(rows, kv_heads, dim, seed=8)
        before = (keys.double(), values.double())
        heads = Heads(
            num_heads, 0, 0, window, biases=None, gammas=gammas, rotation=None, value_lambda=None,
            sinks=sinks, slopes=slopes, eps=1e-6,
        )  # fmt: skip
        attend_cached(projected, heads, places, keys, values, kept, out, keep_values=True)

        parts = projected.double().view(rows, -1, dim).split([num_heads, kv_heads, kv_heads], dim=1)
        norms = [part.square().mean(2, keepdim=True).add(1e-6).rsqrt() for part in parts[:2]]
        query, key = (p * n * g.double() for p, n, g in zip(parts, norms, gammas, strict=False))
        fresh = (torch.arange(rows, device="cuda"), places % slots)
        assert relative_error(keys[fresh], key) < BF16
        assert relative_error(values[fresh], parts[2]) < BF16
        assert torch.equal(kept, values[fresh])
        slot = torch.arange(slots, device="cuda")
        distance = (places[:, None] - 1 - slot) % slots + 1
        seen = slot < places[:, None]
        if window is not None:
            seen &= distance < window
        every = torch.cat([before[0], key[:, None]], dim=1).repeat_interleave(group, dim=2)
        score = torch.einsum("rnd,rsnd->rns", query, every) * dim**-0.5
        distance = torch.nn.functional.pad(distance, (0, 1))
        score -= slopes.double()[:, None] * distance[:, None]
        score.masked_fill_(~torch.nn.functional.pad(seen, (0, 1), value=True)[:, None], -torch.inf)
        sunk = torch.cat([score, sinks.double().expand(rows, -1)[..., None]], dim=2).softmax(2)
        every = torch.cat([before[1], parts[2][:, None]], dim=1).repeat_interleave(group, dim=2)
        expected = torch.einsum("rns,rsnd->rnd", sunk[..., :-1], every)
        assert relative_error(out.view_as(expected), expected) < 2 * BF16  # scores of bf16 heads

    @pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
    @pytest.mark.parametrize("vocab", [97, 20_011])
    def test_draws_are_the_reference_s(self, temperature, vocab):
        from vpmoe.kernels.draw import draw_rows

        logits = randn(50, vocab, scale=3.0)
        logits[0, -1] = 60.0
        streams = torch.tensor([stream_of(-5, n) for n in range(50)], device="cuda")
        places = torch.arange(50, device="cuda")
        rows, own, behavior = draw_rows(logits, streams, places, temperature=temperature)
        expected = choose(logits, uniforms(streams, places), draw=Draw(temperature, 1.0, 0))
        assert torch.equal(rows, expected[0])
        torch.testing.assert_close(own, expected[1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(behavior, expected[2], atol=1e-5, rtol=1e-5)


def shaken_pair(**changes):
    """A fused student and its copy in float64; biases and sinks count."""
    config = config_of(**changes)
    student = build_student(
        config, seed=0, device="cuda", dtype=torch.bfloat16, kernels="fused"
    ).eval()
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith(("bias", "sinks", "value_lambda")):
                noise = torch.randn(parameter.shape, generator=generator, device="cuda")
                parameter.add_(0.2 * noise)
    wide = build_student(config, seed=0, device="cuda", dtype=torch.float64)
    state = student.state_dict().items()
    wide.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in state})
    return student, wide.eval()


class TestStudent:
    pytestmark = needs_gpu

    @torch.no_grad()
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"sinks": False, "value_residual": False, "qk_norm": False, "attention_bias": False},
            {"global_every": 1, "dense_layers": 5, "moe": None},
            {"global_every": 0, "local_attention": TpaConfig(window_size=40, rank=3, q_rank=5)},
            {"local_attention": TpaConfig(window_size=None, position=GrapeAConfig())},
        ],
        ids=["all", "bare", "dense and global", "ranks and rings", "penalties everywhere"],
    )
    def test_steps_equal_float64(self, changes):
        from vpmoe.models.decode_fused import FusedDecoder

        student, wide = shaken_pair(**changes)
        rng = np.random.default_rng(0)
        lengths = (3, 200, 127, 128, 1, 60)
        prompts = [rng.integers(0, 512, n) for n in lengths]
        slots = [6, 0, 2, 4, 3, 5]  # 1 stays empty
        fast = FusedDecoder(student, slots=7, capacity=300)
        slow = ReferenceDecoder(wide, slots=7, capacity=300)
        errors = []
        for decoder in (fast, slow):
            decoder.admit(prompts, slots)
        places = torch.zeros(7, dtype=torch.int64, device="cuda")
        places[slots] = torch.tensor(lengths, device="cuda")
        for _ in range(60):
            rows = torch.from_numpy(rng.integers(0, 512, 7)).cuda()
            for decoder in (fast, slow):
                decoder.read(rows, places)
            gap = (fast.hidden.double() - slow.hidden).norm(dim=1) / slow.hidden.norm(dim=1)
            errors.append(gap[slots])
            places[slots] += 1
        # A choice of experts between near ties may fall otherwise: rarely, and for one token only.
        errors = torch.stack(errors)
        assert errors.median() < 0.02
        assert (errors > 0.05).float().mean() < 0.15

    @torch.no_grad()
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_refreshed_decoder_has_the_parameters_of_the_moment(self, bias):
        from vpmoe.models.decode_fused import FusedDecoder

        student, _ = shaken_pair(attention_bias=bias)
        decoder = FusedDecoder(student, slots=2, capacity=64)

        def places():
            kept = ((s.joint, s.joint_bias, s.halves) for s in decoder.steps)
            return [None if t is None else t.data_ptr() for tensors in kept for t in tensors]

        before = places()
        for parameter in student.parameters():
            parameter.mul_(1.5)
        decoder.refresh()
        assert places() == before  # a graph reads there
        for layer, step in zip(student.layers, decoder.steps, strict=True):
            attention = layer.attention
            names = ("q_proj", "k_proj", "v_proj")
            if isinstance(attention, Tpa):
                names = ("q_b", "k_b", "v_b", "q_a", "k_a", "v_a")
            parts = [getattr(attention, name) for name in names]
            assert torch.equal(step.joint, torch.cat([part.weight for part in parts]))
            biases = [
                part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias
                for part in parts
            ]
            assert (step.joint_bias is None) == all(part.bias is None for part in parts)
            if step.joint_bias is not None:
                assert torch.equal(step.joint_bias, torch.cat(biases))
            if step.halves is not None:
                weight = layer.mlp.router.weight.double()
                high, low = step.halves.double().chunk(2)
                assert ((high + low - weight).abs() <= weight.abs() * 2**-16).all()

    @torch.no_grad()
    def test_completions_are_those_of_the_uncached_student(self):
        student, _ = shaken_pair()
        rng = np.random.default_rng(1)
        prompts = [rng.integers(0, 512, int(n)) for n in rng.integers(1, 200, 40)]
        limits = rng.integers(1, 50, 40).tolist()
        for temperature in (0.0, 1.0):
            done = Sampler(student, max_batch=16).generate(
                prompts, max_new_tokens=limits, temperature=temperature, stop_tokens=range(0, 20)
            )
            gaps, behind = [], []
            for prompt, limit, completion in zip(prompts, limits, done, strict=True):
                sequence = np.concatenate([prompt, completion.tokens])
                tokens = torch.zeros(1, 256, dtype=torch.int64)
                tokens[0, : len(sequence)] = torch.from_numpy(sequence)
                place = torch.arange(256)[None]
                documents = torch.where(place < len(sequence), 0, -1)
                hidden = student(
                    tokens.cuda(), positions=place.cuda(), document_ids=documents.cuda()
                ).hidden[0, len(prompt) - 1 : len(sequence) - 1]
                written = torch.from_numpy(completion.tokens).cuda()
                again = token_logprobs(hidden, student.head_weight, written)
                gaps.append((again.cpu() - torch.from_numpy(completion.logprobs)).abs())
                logits = student.logits(hidden).float()
                behind.append(logits.amax(1) - logits.gather(1, written[:, None])[:, 0])
                ended = completion.tokens[-1] < 20
                assert completion.stop_reason == ("stop" if ended else "length")
                assert ended or len(completion.tokens) == limit
                assert (completion.tokens[:-1] >= 20).all()
            assert torch.cat(gaps).mean() < 0.02
            if temperature == 0:  # what the sampler took is the likeliest, up to bfloat16's ties
                assert torch.cat(behind).max() < 0.1

    @torch.no_grad()
    def test_replayed_experts_are_the_decoder_s(self):
        """More prompts than slots; a step's experts and a prompt's reach the packed pass."""
        student, _ = shaken_pair(num_layers=24)
        rng = np.random.default_rng(1)
        prompts = [rng.integers(0, 512, int(n)) for n in rng.integers(1, 200, 40)]
        limits = rng.integers(1, 50, 40).tolist()
        settings = {"max_new_tokens": limits, "stop_tokens": range(0, 20), "seed": 2}
        keeping, plain = (
            Sampler(student, max_batch=16, keeps_experts=keeps) for keeps in (True, False)
        )
        gaps = {True: [], False: []}
        for _ in range(2):  # prompt passes and steps launched, then replayed
            done = keeping.generate(prompts, **settings)
            same = [
                np.array_equal(a.tokens, b.tokens)
                for a, b in zip(done, plain.generate(prompts, **settings), strict=True)
            ]
            assert np.mean(same) > 0.5
            for prompt, completion in zip(prompts, done, strict=True):
                sequence = np.concatenate([prompt, completion.tokens])
                kept = torch.from_numpy(completion.expert_ids)
                assert kept.shape == (len(sequence) - 1, 23, 4)
                assert (kept < 32).all()
                assert (kept.int().sort(dim=2).values.diff(dim=2) > 0).all()
                tokens = torch.zeros(1, 256, dtype=torch.int64)
                tokens[0, : len(sequence)] = torch.from_numpy(sequence)
                place = torch.arange(256)[None]
                documents = torch.where(place < len(sequence), 0, -1)
                expert_ids = torch.full((1, 256, 23, 4), 255, dtype=torch.uint8)
                expert_ids[0, : len(kept)] = kept
                for is_replayed, given in ((True, expert_ids.cuda()), (False, None)):
                    hidden = student(
                        tokens.cuda(),
                        positions=place.cuda(),
                        document_ids=documents.cuda(),
                        expert_ids=given,
                    ).hidden[0, len(prompt) - 1 : len(sequence) - 1]
                    written = torch.from_numpy(completion.tokens).cuda()
                    again = token_logprobs(hidden, student.head_weight, written)
                    gap = (again.cpu() - torch.from_numpy(completion.logprobs)).abs()
                    gaps[is_replayed].append(gap)
        replayed, free = (torch.cat(gaps[key]).mean() for key in (True, False))
        assert replayed < 0.02
        assert replayed <= 1.1 * free

    @torch.no_grad()
    def test_neighbours_leave_no_trace(self):
        student, _ = shaken_pair()
        rng = np.random.default_rng(2)
        prompts = [rng.integers(0, 512, int(n)) for n in rng.integers(1, 200, 24)]
        limits = rng.integers(1, 40, 24).tolist()
        first, second = (
            Sampler(student, max_batch=batch).generate(
                prompts, max_new_tokens=limits, seed=3, stop_tokens=()
            )
            for batch in (24, 8)
        )
        same = [np.array_equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True)]
        assert np.mean(same) > 0.5  # another order of sums turns a draw now and then
        assert all(a.tokens[0] == b.tokens[0] for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_dim": 16}, "head_dim 16"),
        ({"activation": "swiglu"}, "swiglu units"),
        ({"dense_hidden": 40}, "widths"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(changes, said):
    pytest.importorskip("triton")
    from vpmoe.models.decode_fused import require_decodable

    with pytest.raises(ConfigError, match=said):
        require_decodable(config_of(**changes))
