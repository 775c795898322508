from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from tests.train.toy import ToyPlan, student_config, train_config
from vpmoe.models.student import build_student
from vpmoe.train.estimate import estimate
from vpmoe.train.regions import OTHER, REGIONS, attribute, marked, scoped
from vpmoe.train.step import run_student


def profiled(student, batch):
    with marked(student), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        inputs, _ = run_student(student, batch)
        product = scoped("head + loss", torch.mm)
        product(inputs.hidden, inputs.head_weight.T).square().sum().backward()
    return found.events()


def test_all_time_is_in_a_known_region_and_counted_once(tmp_path):
    config = train_config(tmp_path / "run")
    student = build_student(student_config(), seed=0)
    events = profiled(student, ToyPlan(config).micro_batches(0)[0][0])
    found = attribute(events, shared_width=student.config.moe.shared_expert_hidden)
    assert set(found.regions) <= set(REGIONS)
    own = sum(e.self_cpu_time_total for e in events if not e.name.startswith("vpmoe/")) / 1e3
    assert abs(sum(found.regions.values()) - own) < 1e-6 * own
    assert abs(sum(row[3] for row in found.kernels) - own) < 1e-6 * own
    for region in ("attention local", "attention global", "shared expert", "router", "experts"):
        assert found.regions[region] > 0, region


def test_a_backward_operation_belongs_to_the_forward_one_it_differentiates(tmp_path):
    config = train_config(tmp_path / "run")
    student = build_student(student_config(), seed=0)
    batch = ToyPlan(config).micro_batches(0)[0][0]
    events = profiled(student, batch)
    table = {}
    for name, region, calls, _ in attribute(events, shared_width=0).kernels:
        table.setdefault(name, {})[region] = calls
    # The head is one product forward and two backward; attention's softmax knows its own region.
    assert table["aten::mm"]["head + loss"] == 3
    backward = [name for name in table if "SinkSoftmaxBackward" in name]
    assert backward and all(
        set(table[n]) <= {"attention local", "attention global"} for n in backward
    )
    assert OTHER in table["aten::embedding_dense_backward"]


def test_marks_leave_no_trace():
    student = build_student(student_config(), seed=0)
    before = [(layer.kernels, layer.mlp.__dict__.get("kernels")) for layer in student.layers]
    with marked(student):
        assert student.layers[0].kernels is not before[0][0]
    assert [(x.kernels, x.mlp.__dict__.get("kernels")) for x in student.layers] == before


def test_weights_and_optimizer_are_estimated_to_the_byte(tmp_path):
    from vpmoe.optim.optimizer import NorMuonAdamW

    config = train_config(tmp_path / "run", dtype="bfloat16")
    student = build_student(student_config(), seed=0, dtype=torch.bfloat16)
    found = estimate(config, student.config)
    weights = sum(p.numel() * p.element_size() for p in student.parameters())
    assert found.weights_gib == weights / 2**30
    optimizer = NorMuonAdamW(student.named_parameters(), config.optimizer)
    held = 0
    for state in optimizer.state().values():
        held += sum(v.numel() * v.element_size() for v in state.values() if torch.is_tensor(v))
    assert abs(found.optimizer_gib * 2**30 - held) < 0.02 * held
    assert found.step_s is None  # nothing is known of the reference's speed


def test_kernels_that_no_operation_launched_belong_to_the_scope_around_them():
    """As on a GPU: one linked kernel, one in the optimizer's scope, one outside of all."""

    def on_device(name, begin, end, kernels=(), *, is_scope=False):
        span = SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin)
        return SimpleNamespace(
            name=name, time_range=span, kernels=list(kernels), sequence_nr=-1, cpu_parent=None,
            device_type=SimpleNamespace(name="CUDA"), input_shapes=[], self_cpu_time_total=0,
            is_user_annotation=is_scope,
        )  # fmt: skip

    operation = on_device("aten::mm", 0, 5, [SimpleNamespace(name="product", duration=10)])
    operation.device_type.name = "CPU"
    events = [
        operation,
        on_device("product", 0, 10),
        on_device("vpmoe/optimizer", 20, 60, is_scope=True),
        on_device("## Call CompiledFxGraph", 0, 80, is_scope=True),
        on_device("move", 20, 40),
        on_device("move", 40, 60),
        on_device("vpmoe/data", 62, 90, is_scope=True),
        on_device("vpmoe/router", 64, 66, is_scope=True),
        on_device("late", 70, 75),
        on_device("product", 95, 105),  # as long as the linked one, and another
    ]
    found = attribute(events, shared_width=0)
    assert found.regions == {OTHER: 0.02, "optimizer": 0.04, "data": 0.005}
    assert ("move", "optimizer", 2, 0.04) in found.kernels
    assert found.busy_ms == 0.065
