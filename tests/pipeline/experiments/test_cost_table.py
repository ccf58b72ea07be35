"""Cost tables equal counts by hand: of convolutions, products, tokens and parameters."""

import json

import pandas as pd
import pytest
import torch

from varve import BuildSpec, cost
from varve.pipeline.experiments import cost_table
from varve.pipeline.experiments.cost import module_costs, named_modules
from varve.pipeline.experiments.run_spec import prepare_run
from varve.stores import FeatureStore

CLASSES = ("grow", "shrink", "fade in", "fade out")
RESNET, VIT, MEL = "resnet18:random-0", "ViT-S-32:random-0", "mel_resnet18:random-0"
SCENARIO, T, K = "2+1x2", 2, 4
D, L, HIDDEN = 384, 50, 4 * 384  # of the ViT: width, tokens, hidden width of its MLPs

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def store(dataset, built_once) -> FeatureStore:
    maps = BuildSpec((RESNET,), keep=("layer3.1", "pool"), frames=T)
    keep = ("blocks.10.attn", "blocks.11.attn:cls", "proj")
    specs = maps, BuildSpec((VIT,), keep, T), BuildSpec((MEL,), ("pool",), T)
    return FeatureStore.open(built_once(dataset(CLASSES, 3), *specs))


def conv(k, cin, cout, side):
    """Multiply-adds of a k x k convolution of one frame with an output of side x side."""
    return k * k * cin * cout * side * side


def residual(cin, cout, side):
    """Multiply-adds of a basic block; one that changes the width has a 1 x 1 convolution."""
    shortcut = conv(1, cin, cout, side) if cin != cout else 0
    return conv(3, cin, cout, side) + conv(3, cout, cout, side) + shortcut


def residual_parameters(cin, cout):
    shortcut = cin * cout + 2 * cout if cin != cout else 0
    return 9 * cin * cout + 9 * cout * cout + 4 * cout + shortcut


STEM = 49 * 3 * 64 + 2 * 64
BEFORE = (  # up to layer3.1
    conv(7, 3, 64, 112) + 2 * residual(64, 64, 56) + residual(64, 128, 28)
    + residual(128, 128, 28) + residual(128, 256, 14) + residual(256, 256, 14)
)  # fmt: skip
BEFORE_PARAMETERS = STEM + sum(
    residual_parameters(*widths)
    for widths in ((64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256))
)
LAST = residual(256, 512, 7) + residual(512, 512, 7)
LAST_PARAMETERS = residual_parameters(256, 512) + residual_parameters(512, 512)


def rows_of(table: pd.DataFrame) -> dict[tuple[str, bool], tuple[int, int]]:
    """Parameters and multiply-adds by part, and by whether it comes from the cache."""
    return {
        (row["part"], row["cached"]): (row["parameters"], row["multiply_adds"])
        for row in table.to_dict("records")
    }


def test_gates_cost_what_their_convolutions_have_and_nothing_when_off(store):
    counted = cost(store, "hf_net", SCENARIO, backbone=RESNET, grid={"gates": [0, 1, 2]})
    classifier = K * 10 * 512
    network = {
        ("backbone", True): (BEFORE_PARAMETERS, T * BEFORE),
        ("blocks", False): (LAST_PARAMETERS, T * LAST),
        ("classifier", False): (classifier + 1, classifier),  # with the scale of cosines
    }
    for gates in range(3):
        gate = {("hf_gate", False): (gates * (2 * 9 * 512 + 1), gates * T * conv(3, 512, 2, 7))}
        table = counted.parts[counted.parts["gates"] == gates]
        assert rows_of(table) == network | (gate if gates else {})
    totals = counted.totals().set_index("gates")
    assert totals.loc[0, "parameters from raw video"] == 11_176_512 + classifier + 1
    assert totals.loc[0, "multiply_adds from the cache"] == T * LAST + classifier
    assert counted.latency.empty


def test_blocks_of_class_regularization_cost_their_projection_and_nothing_when_off(store):
    strengths = [[0.0] * 4, [0.1, 0.2, 0.3, 0.4]]
    counted = cost(
        store, "class_regularization", SCENARIO, backbone=RESNET, grid={"strengths": strengths}
    )
    off, on = (
        rows_of(counted.parts[[value == wanted for value in counted.parts["strengths"]]])
        for wanted in strengths
    )
    # The classifier's weight is read, not counted twice.
    assert on == off | {("class_regularization", False): (512 * 512, K * 512 * 512)}
    assert "class_regularization" not in {part for part, _ in off}
    assert len(counted.totals()) == 2


def attention(tokens):
    return 4 * tokens * D * D + 2 * tokens * tokens * D


def expert(width, tokens, ffn=2048, heads=2):
    """Multiply-adds of two whole layers, and of one that computes the first row alone."""
    whole = tokens * (4 * width**2 + 2 * width * ffn) + 2 * tokens**2 * width
    last = 4 * width**2 + 2 * width * ffn + 2 * heads * tokens * width
    return 2 * whole + last


LAYER = 4 * D * D + 4 * D + 2 * D * 2048 + 2048 + D + 4 * D
EXPERT = 3 * LAYER + D + 2 * D
BLOCK = 12 * D * D + 13 * D
VIT_PARAMETERS = 32 * 32 * 3 * D + (1 + L) * D + 2 * D + 12 * BLOCK + 2 * D + D * D
MLP, MLP_PARAMETERS = 2 * D * HIDDEN, 2 * D * HIDDEN + HIDDEN + D + 2 * D


@pytest.mark.parametrize("adapters", [0, 1, 2])
def test_adapters_experts_and_backbone_of_stpr_are_counted_apart(store, adapters):
    options = {"adapters": adapters, "text": "means"}
    table = cost(store, "stpr", SCENARIO, backbone=VIT, options=options).parts
    frozen = {
        0: (0, 0),
        # After the last attention the class token alone is computed.
        1: (MLP_PARAMETERS + 2 * D + D * D, T * (MLP + D * D)),
        2: (
            MLP_PARAMETERS + BLOCK + 2 * D + D * D,
            T * (2 * L * MLP + attention(L) + D * D),
        ),
    }[adapters]
    stem = conv(32, 3, D, 7)
    every = T * (stem + 12 * (attention(L) + L * MLP) + D * D)
    cached = {0: every, 1: every - T * (L * MLP + D * D), 2: every - frozen[1]}[adapters]
    tokens = {0: 0, 1: 1, 2: 2 * L}[adapters]
    expected = {
        ("backbone", True): (VIT_PARAMETERS - frozen[0], cached),
        ("backbone", False): frozen,
        ("adapter", False): (adapters * 2 * D * 64, T * tokens * 2 * D * 64),
        ("experts", False): (3 * EXPERT, 3 * expert(D, T + 1)),
        ("classifier", False): (0, K * D),
    }
    assert rows_of(table) == {name: row for name, row in expected.items() if any(row)}


def test_a_head_in_closed_form_has_its_products_and_the_whole_cached_network(store):
    table = cost(store, "nearest_mean", SCENARIO, backbone=RESNET).parts
    assert rows_of(table) == {
        ("backbone", True): (BEFORE_PARAMETERS + LAST_PARAMETERS, T * (BEFORE + LAST)),
        ("classifier", False): (0, K * 512),
    }


def test_each_network_that_a_head_reads_has_a_row(store):
    W, F = 64, 32
    options = {"width": W, "heads": 2, "ffn": F}
    rows = rows_of(cost(store, "had", SCENARIO, backbone=RESNET, options=options).parts)
    assert rows.pop((f"backbone {RESNET}", True)) == (
        BEFORE_PARAMETERS + LAST_PARAMETERS, T * (BEFORE + LAST),
    )  # fmt: skip
    parameters, multiply_adds = rows.pop((f"backbone {MEL}", True))
    assert parameters > 0
    assert multiply_adds > 0
    attend = 2 * (4 * W * W + 4 * W) + 4 * W + 2 * W * F + F + W
    products = T * 512 * W + 2 * (4 * T * W * W + 2 * T * T * W) + 2 * T * W * F
    assert rows == {
        ("encoder", False): (
            2 * (512 * W + W + attend) + 2 * W * W + W, 2 * products + 2 * W * W,
        ),
        ("classifier", False): (K * W + 1, K * W),
    }  # fmt: skip


def test_what_serves_training_alone_has_parameters_and_no_multiply_adds(store):
    table = cost(store, "hce", SCENARIO, backbone=RESNET).parts
    parameters, multiply_adds = rows_of(table)["has", False]
    assert parameters > 0
    assert multiply_adds == 0


def test_a_graft_around_a_graft_has_its_own_parameters_alone(store):
    options = {"graft": "class_regularization", "graft_options": {"strength": 0.3}}
    rows = rows_of(cost(store, "hf_net", SCENARIO, backbone=RESNET, options=options).parts)
    gates = (2 * (2 * 9 * 512 + 1), 2 * T * conv(3, 512, 2, 7))
    assert rows["hf_gate", False] == gates
    assert rows["class_regularization", False] == (2 * 512 * 512, 2 * K * 512 * 512)


def test_latency_is_measured_by_stage_and_for_the_whole_network(store):
    counted = cost(store, "hf_net", SCENARIO, backbone=RESNET, latency=2)
    table = counted.latency
    assert table["stage"].tolist() == ["layer4.0", "layer4.1", "from the cache", "from raw video"]
    assert set(table["graft"]) == {"hf_gate"}
    numbers = table[["milliseconds", "milliseconds_without", "ratio"]]
    assert (numbers > 0).all(axis=None)
    plain = cost(store, "hf_net", SCENARIO, backbone=RESNET, options={"gates": 0}, latency=1)
    assert plain.latency["stage"].tolist() == ["from the cache", "from raw video"]
    assert plain.latency["ratio"].isna().all()
    with pytest.raises(ValueError, match="latency=-1"):
        cost(store, "hf_net", SCENARIO, backbone=RESNET, latency=-1)


def test_two_calls_are_timed_in_turn():
    calls = []
    medians = cost_table.alternated(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert "".join(calls) in ("abbaabba", "baabbaab")
    assert len(medians) == 2
    assert min(medians) >= 0


def test_a_head_computes_after_a_count_as_before(store):
    options = {"first_epochs": 0, "epochs": 0, "tune_epochs": 0}
    plan = prepare_run(store, "hf_net", SCENARIO, options=options, backbone=RESNET)
    clips = cost_table._learn(plan)
    batch = clips[torch.arange(2)]
    before = plan.head.scores(batch)
    assert not before[0].equal(before[1])  # each clip is computed, not the first alone
    module_costs(plan.head, clips)
    cost_table._latencies(plan, clips, 1)
    assert plan.head.scores(batch).equal(before)
    for _, module in named_modules(plan.head):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_the_command_prints_the_table(store, varve):
    words = ["cost", store.path, "--head", "hf_net", "--scenario", SCENARIO, "--backbone", RESNET]
    text = varve(*words, "--set", "gates=1").stdout
    lines = {line.split("  ")[0]: line.split()[-2:] for line in text.splitlines() if "," in line}
    assert lines["hf_gate"] == [f"{18 * 512 + 1:,}", f"{T * conv(3, 512, 2, 7):,}"]
    assert lines["backbone, cached"] == [f"{BEFORE_PARAMETERS:,}", f"{T * BEFORE:,}"]
    facts = json.loads(varve(*words, "--latency", "1", "--json").stdout)
    assert {part["part"] for part in facts["parts"]} >= {"backbone", "blocks", "hf_gate"}
    assert len(facts["latency"]) == 4
    assert len(facts["totals"]) == 1
