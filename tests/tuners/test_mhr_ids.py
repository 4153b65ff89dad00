"""Task ids: how they are given, that wrong ones raise, and that they reach every row of every forward."""

from __future__ import annotations

import copy
import threading

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

from tests.support.mhr import config, logits, routed, tokens
from tests.support.models import VOCAB, tiny_llama, tiny_t5
from thawline import RoutingError, route_by_batch, set_task_ids, start_adaptation
from thawline.tuners.mhr.ids import read_ids
from thawline.tuners.mhr.layer import find_layers

NAMES = ["translate", "summarise", "rank"]


# Giving ids.


@pytest.mark.parametrize(
    "ids",
    [
        [2, 0, 1],
        (2, 0, 1),
        torch.tensor([2, 0, 1]),
        torch.tensor([[2], [0], [1]], dtype=torch.int32),
        np.array([2, 0, 1]),
        list(np.array([2, 0, 1])),
        list(torch.tensor([2, 0, 1])),
        list(torch.tensor([2, 0, 1])[:, None].expand(3, 7)),
        ["rank", "translate", "summarise"],
        ["rank", 0, "summarise"],
        torch.tensor([2, 0, 1])[:, None].expand(3, 7),
    ],
    ids=[
        "list",
        "tuple",
        "tensor",
        "column",
        "array",
        "array's numbers",
        "scalars",
        "rows per token",
        "names",
        "mixed",
        "per token",
    ],
)
def test_ids_are_read_in_every_usual_form(ids) -> None:
    model = routed(n_tasks=None, task_names=NAMES)
    x = tokens()
    set_task_ids(model, [2, 0, 1])
    expected = logits(model, x)
    set_task_ids(model, ids)
    torch.testing.assert_close(logits(model, x), expected)


def test_one_id_or_name_is_for_all_rows() -> None:
    model = routed(n_tasks=None, task_names=NAMES)
    x = tokens()
    set_task_ids(model, [2, 2, 2])
    expected = logits(model, x)
    for one in (2, "rank", torch.tensor(2)):
        set_task_ids(model, one)
        torch.testing.assert_close(logits(model, x), expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, -1], "-1 is negative"),
        ([0, 1, 3], "3 is not in the routing table, which has rows 0 to 2"),
        ([0, 1], "2 task ids for 3 rows"),
        ([0, 1, 2, 0], "4 task ids for 3 rows"),
        ([0, 1, "sumarise"], "Did you mean 'summarise'"),
        ([0.0, 1.0, 2.0], "0.0 is a float"),
        ([0, 1, True], "True is a bool"),
        ([np.float32(0), 1, 2], "0.0 is a float"),
        ([torch.tensor(True), 1, 2], "True is a bool"),
        (torch.tensor([0.0, 1.0, 2.0]), "torch.float32"),
        (torch.tensor([True, False, True]), "torch.bool"),
        ([], "expected one per row"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), "is a list"),
        ([[0, 1], [1]], "all rows of the same length"),
        (torch.zeros(3, 5, dtype=torch.int64), "5 tokens per row"),
        (torch.zeros(2, 7, dtype=torch.int64), "2 task ids for 3 rows"),
    ],
)
@pytest.mark.parametrize("way", ["set", "batch"])
def test_wrong_ids_raise(ids, message: str, way: str) -> None:
    model = routed(n_tasks=None, task_names=NAMES)
    if way == "batch":
        route_by_batch(model)
        with pytest.raises(RoutingError, match=message):
            model(input_ids=tokens(), task_ids=ids)
    else:
        with pytest.raises(RoutingError, match=message):  # noqa: PT012
            set_task_ids(model, ids)
            model(input_ids=tokens())


@pytest.mark.parametrize("training", [True, False])
def test_missing_ids_raise_until_set_and_after_cleared(training: bool) -> None:
    model = routed().train(training)
    with pytest.raises(RoutingError, match="No task ids: the routing table has 3 rows"):
        model(input_ids=tokens())
    set_task_ids(model, [0, 1, 2])
    model(input_ids=tokens())
    set_task_ids(model, None)
    with pytest.raises(RoutingError, match="No task ids"):
        model(input_ids=tokens())


def test_ids_for_fewer_rows_raise_in_training_instead_of_repeating() -> None:
    model = routed().train()
    set_task_ids(model, [0, 1])
    with pytest.raises(RoutingError, match="2 task ids for 4 rows"):
        model(input_ids=tokens(4))


def test_a_table_of_one_row_needs_no_ids() -> None:
    model = routed(n_tasks=1)
    x = tokens()
    without = logits(model, x)
    set_task_ids(model, [0, 0, 0])
    torch.testing.assert_close(logits(model, x), without)


def test_after_mu_no_ids_are_needed_and_none_refused() -> None:
    model = routed()
    start_adaptation(model, "mu", ["new"])
    x = tokens()
    without = logits(model, x)
    for ids in ([0, 0, 0], [7, -1, 2], 5, "whatever", None):
        set_task_ids(model, ids)
        assert torch.equal(logits(model, x), without)


def test_as_a_context_the_ids_of_before_come_back() -> None:
    model = routed()
    x = tokens()
    set_task_ids(model, 1)
    before = logits(model, x)
    with set_task_ids(model, 2):
        assert not torch.allclose(logits(model, x), before)
    assert torch.equal(logits(model, x), before)


def test_ids_reach_a_copy_of_the_model_and_only_it() -> None:
    model = routed()
    set_task_ids(model, 1)
    before = logits(model, tokens())
    twin = copy.deepcopy(model)
    set_task_ids(twin, 2)
    assert torch.equal(logits(model, tokens()), before)
    assert not torch.allclose(logits(twin, tokens()), before)


# Ids from the batch.


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_ids_come_with_the_batch_once_the_model_reads_them(task_type: str | None) -> None:
    model = routed(task_type=task_type)
    x = tokens()
    set_task_ids(model, [2, 0, 1])
    expected = model(input_ids=x)[0]
    set_task_ids(model, None)
    assert route_by_batch(model) is model
    assert torch.equal(model(input_ids=x, task_ids=torch.tensor([2, 0, 1]))[0], expected)
    with pytest.raises(RoutingError, match=r"No task ids came with the batch.*remove_unused_columns=False"):
        model(input_ids=x)  # those of the last batch are not this one's


@pytest.mark.parametrize(
    "wrapper",
    [
        peft.PeftModel,
        peft.PeftModelForCausalLM,
        peft.PeftModelForSeq2SeqLM,
        peft.PeftModelForFeatureExtraction,
        peft.PeftModelForSequenceClassification,
        peft.PeftModelForTokenClassification,
        peft.PeftModelForQuestionAnswering,
    ],
)
def test_ids_in_the_batch_of_a_model_that_does_not_read_them_raise(wrapper: type[peft.PeftModel]) -> None:
    model = wrapper(tiny_t5() if "Seq2Seq" in wrapper.__name__ else tiny_llama(), config())
    set_task_ids(model, [0, 1, 2])
    with pytest.raises(RoutingError, match=r"thawline.route_by_batch\(model\) once"):
        model(input_ids=tokens(), task_ids=torch.tensor([0, 1, 2]))


def test_ids_set_by_hand_serve_batches_without_any() -> None:
    model = route_by_batch(routed())
    set_task_ids(model, 1)
    expected = logits(model, tokens())
    logits(model, tokens(), task_ids=[0, 1, 2])
    with pytest.raises(RoutingError, match="No task ids"):
        model(input_ids=tokens())
    set_task_ids(model, 1)
    assert torch.equal(logits(model, tokens()), expected)


class OfADict(nn.Module):
    """Takes its batch as one argument, in which no tensor is seen from outside; or a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)

    def forward(self, batch):
        return self.linear(batch["x"] if isinstance(batch, dict) else batch)


@pytest.mark.parametrize("noise", ["none", "example"])
def test_a_forward_without_a_tensor_argument_is_a_forward_of_its_own(noise: str) -> None:
    model = routed(OfADict(), target_modules=["linear"], noise=noise).train()
    x = torch.randn(3, 5, 8)
    set_task_ids(model, [0, 1, 2])
    model(x).square().sum().backward()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    optimiser.step()  # what the first forward mixed is stale now
    first, second = model({"x": x}), model({"x": x})
    assert torch.equal(first, second) == (noise == "none")
    second.square().sum().backward()
    if noise == "none":
        torch.testing.assert_close(second, model(x))
    with pytest.raises(RoutingError, match="3 task ids for 2 rows of a layer's input"):
        model({"x": x[:2]})


# Names of several adapters.


def test_names_of_one_adapter_are_not_read_as_rows_of_another() -> None:
    model = routed(n_tasks=None, task_names=NAMES)
    model.add_adapter("reversed", config(n_tasks=None, task_names=NAMES[::-1]))
    model.add_adapter("numbered", config())
    set_task_ids(model, "rank")
    model.set_adapter("reversed")
    with pytest.raises(RoutingError, match=r"of another list of tasks than adapter 'reversed' has"):
        model(input_ids=tokens())
    set_task_ids(model, "rank")
    named = logits(model, tokens())
    set_task_ids(model, 0)  # a number means that row of whichever is active
    assert torch.equal(logits(model, tokens()), named)
    model.base_model.set_adapter(["default", "reversed"])
    with pytest.raises(RoutingError, match=r"\['default', 'reversed'\] have the same tasks in another order"):
        set_task_ids(model, "rank")
    model.base_model.set_adapter(["default", "numbered"])
    set_task_ids(model, "rank")
    expected = logits(model, tokens())
    set_task_ids(model, 2)
    assert torch.equal(logits(model, tokens()), expected)


def test_ids_find_the_active_adapter_wherever_it_is() -> None:
    model = routed(target_modules=["q_proj"])
    model.add_adapter("second", config(target_modules=["down_proj"], n_tasks=4))
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")  # the first layers have none now, and the last ones the second
    inner = model.base_model.model  # PEFT's wrapper wants set_adapter first
    with pytest.raises(RoutingError, match="No task ids: the routing table has 4 rows"):
        inner(input_ids=tokens())
    set_task_ids(inner, [3, 0, 1])
    assert not torch.allclose(logits(inner, tokens()), logits(tiny_llama(), tokens()))


# Forwards within forwards, and beside one another.


@pytest.mark.parametrize("how", ["context", "batch"])
def test_a_forward_within_a_forward_leaves_the_outer_ones_ids_alone(how: str) -> None:
    model = routed(noise="task").train()
    x = tokens()
    if how == "batch":
        route_by_batch(model)

    def run(inner: bool) -> list[torch.Tensor]:
        def call_again(*_) -> None:
            handle.remove()
            with torch.no_grad(), torch.random.fork_rng():
                if how == "batch":
                    model(input_ids=x[:2], task_ids=[2, 2])
                else:
                    with set_task_ids(model, [2, 2]):
                        model(input_ids=x[:2])

        if inner:
            handle = model.get_base_model().model.layers[0].register_forward_hook(call_again)
        torch.manual_seed(3)
        if how == "context":
            set_task_ids(model, [0, 1, 2])
        loss = model(input_ids=x, labels=x, **({"task_ids": [0, 1, 2]} if how == "batch" else {})).loss
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    for got, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, expected)


def test_an_interrupted_forward_changes_none_that_come_later() -> None:
    model, x = routed(), tokens()
    set_task_ids(model, [2, 2, 2])
    expected = logits(model, x)

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().model.layers[0].register_forward_hook(interrupt)
    with set_task_ids(model, [0, 1, 2]), pytest.raises(KeyboardInterrupt):
        model(input_ids=x)
    handle.remove()
    set_task_ids(model, [2, 2, 2])
    for _ in range(2):
        assert torch.equal(logits(model, x), expected)


def test_two_threads_never_get_each_others_ids() -> None:
    model, x = route_by_batch(routed()), tokens()
    expected = {task: logits(model, x, task_ids=task) for task in (0, 2)}
    outcomes: list[str] = []

    def work(task: int) -> None:
        for _ in range(20):
            try:
                got = logits(model, x, task_ids=task)
                outcomes.append("right" if torch.equal(got, expected[task]) else "wrong")
            except RoutingError as error:
                outcomes.append("refused" if "Another thread" in str(error) else str(error))

    threads = [threading.Thread(target=work, args=(task,)) for task in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {"right", "refused"}
    logits(model, x, task_ids=0)


def test_another_threads_ids_are_refused_while_a_forward_runs() -> None:
    model, x = routed(), tokens()
    set_task_ids(model, 1)
    expected, errors = logits(model, x), []

    def disturb(*_) -> None:
        for call in (lambda: set_task_ids(model, 2), lambda: model(input_ids=x)):
            thread = threading.Thread(target=lambda call=call: errors.append(refusal(call)))
            thread.start()
            thread.join()

    def refusal(call) -> str:
        with pytest.raises(RoutingError) as error:
            call()
        return str(error.value)

    handle = model.get_base_model().model.layers[0].register_forward_hook(disturb)
    assert torch.equal(logits(model, x), expected)
    handle.remove()
    assert all("Another thread is running this model" in error for error in errors)
    assert len(errors) == 2
    assert torch.equal(logits(model, x), expected)


def test_copies_in_threads_of_data_parallel_are_refused_by_name() -> None:
    model, x = routed(nn.Sequential(nn.Linear(8, 12)), target_modules=["0"]), torch.randn(3, 5, 8)
    set_task_ids(model, [0, 1, 2])
    replica = (
        model.get_base_model()._replicate_for_data_parallel()
    )  # as nn.DataParallel makes one for each GPU
    with pytest.raises(RoutingError, match="torchrun"):
        replica(x)
    model(x)


# Rows.


@pytest.mark.parametrize(
    ("ids", "rows", "index", "groups"),
    [
        ([2, 2, 2, 2], [2], None, 1),
        ([2, 2, 0, 0], [2, 0], None, 2),  # groups of rows that follow one another
        ([2, 0, 1, 3], [2, 0, 1, 3], None, 4),
        ([2, 0, 2, 1], [2, 0, 1], [0, 1, 0, 2], 4),
        ([2, 2, 0, 0, 2, 2], [2, 0], [0, 1, 0], 3),
        ([[2, 0, 2]], [2, 0], [0, 1, 0], 3),  # by token
    ],
)
def test_each_task_of_a_batch_is_looked_up_and_mixed_once(ids, rows, index, groups) -> None:
    found = read_ids(ids, config(n_tasks=4), torch.device("cpu")).groups
    assert found.rows.tolist() == rows
    assert (None if found.index is None else found.index.tolist()) == index
    assert found.n == groups


def test_the_pooled_rows_of_an_encoder_are_routed_like_its_tokens() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = routed(BertModel(BertConfig(vocab_size=VOCAB, **sizes)))
    assert any("pooler" in name for name, _ in find_layers(model))
    x, ids = tokens(), [2, 0, 1]
    set_task_ids(model, ids)
    with torch.no_grad():
        pooled = model(input_ids=x).pooler_output
        for row, task in enumerate(ids):
            set_task_ids(model, task)
            torch.testing.assert_close(model(input_ids=x[row : row + 1]).pooler_output[0], pooled[row])


def test_a_mixed_batch_equals_its_rows_alone_in_any_order() -> None:
    model = routed()
    x, ids = tokens(5), [2, 0, 0, 1, 2]
    set_task_ids(model, ids)
    mixed = logits(model, x)
    for row, task in enumerate(ids):
        set_task_ids(model, task)
        torch.testing.assert_close(logits(model, x[row : row + 1])[0], mixed[row])
    order = [3, 1, 4, 0, 2]
    set_task_ids(model, [ids[place] for place in order])
    torch.testing.assert_close(logits(model, x[order]), mixed[order])


@pytest.mark.parametrize("ids", [[1, 1, 1, 1], [0, 0, 2, 2], [0, 2, 0, 2], [0, 1, 2, 2], [2, 1, 1, 0]])
def test_gradients_agree_however_rows_share_tasks(ids: list[int]) -> None:
    model = routed()
    x = tokens(4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    set_task_ids(model, ids)
    mixed = torch.autograd.grad(model(input_ids=x).logits.square().sum(), parameters)
    alone = [torch.zeros_like(p) for p in parameters]
    for row, task in enumerate(ids):
        set_task_ids(model, task)
        loss = model(input_ids=x[row : row + 1]).logits.square().sum()
        for total, part in zip(alone, torch.autograd.grad(loss, parameters), strict=True):
            total += part
    for got, expected in zip(mixed, alone, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_packed_rows_route_token_by_token() -> None:
    model = routed(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)), target_modules=["0", "1"])
    x = torch.randn(2, 6, 8)
    ids = torch.tensor([[0, 0, 2, 2, 2, 1], [1, 1, 1, 0, 0, 0]])
    set_task_ids(model, ids)
    packed = model(x)
    for task in range(3):
        set_task_ids(model, task)
        torch.testing.assert_close(packed[ids == task], model(x)[ids == task])
    set_task_ids(model, ids)
    torch.testing.assert_close(model(x.flatten(0, 1)[None].view(2, 6, 8)), packed)
    layers_see_tokens = model.base_model.model[0](x.flatten(0, 1))
    torch.testing.assert_close(layers_see_tokens.view(2, 6, 12), model.base_model.model[0](x))


PACKED = torch.tensor([[0, 0, 2, 2, 2, 1], [1, 1, 1, 0, 0, 0]])


def packed_documents() -> dict[str, torch.Tensor]:
    """Two rows of documents, each of a task of its own, that do not see one another."""
    own = (PACKED[:, None, :, None] == PACKED[:, None, None, :]) & torch.ones(6, 6).tril().bool()
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2]])
    return {"input_ids": tokens(2, 6), "position_ids": positions, "attention_mask": own}


def test_packed_documents_of_a_whole_llama_equal_each_alone() -> None:
    model, batch = routed().train(), packed_documents()
    parameters = [p for p in model.parameters() if p.requires_grad]
    set_task_ids(model, PACKED)
    out = model(**batch).logits
    alone = [torch.zeros_like(p) for p in parameters]
    for row, tasks in enumerate(PACKED):
        for task in tasks.unique():
            set_task_ids(model, task)
            one = model(input_ids=batch["input_ids"][row : row + 1, tasks == task]).logits
            torch.testing.assert_close(one[0], out[row, tasks == task])
            for total, part in zip(alone, torch.autograd.grad(one.square().sum(), parameters), strict=True):
                total += part
    for got, expected in zip(torch.autograd.grad(out.square().sum(), parameters), alone, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    set_task_ids(model, PACKED)
    with pytest.raises(RoutingError, match="6 tokens per row, but the batch has"):
        model.generate(input_ids=batch["input_ids"], max_new_tokens=2)


@pytest.mark.parametrize("noise", ["none", "example"])
def test_packed_documents_keep_noise_and_gradients_under_checkpointing(noise: str) -> None:
    found = []
    for use_reentrant in (None, True, False):
        model = routed(noise=noise).train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        set_task_ids(model, PACKED)
        torch.manual_seed(7)
        model(**packed_documents()).logits.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, *checkpointed in zip(*found, strict=True):
        for got in checkpointed:
            torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (3, 2, 5, 8)])
def test_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    model = routed(nn.Sequential(nn.Linear(8, 12)), target_modules=["0"])
    x = torch.randn(shape)
    set_task_ids(model, [2, 0, 1])
    out = model(x)
    assert out.shape == (*shape[:-1], 12)
    for row, task in enumerate([2, 0, 1]):
        set_task_ids(model, task)
        torch.testing.assert_close(model(x[row : row + 1])[0], out[row])


class Flattening(nn.Module):
    """Rows and tokens in one axis, as some feed-forward blocks do it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)

    def forward(self, x):
        return self.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Shuffling(Flattening):
    """Some of the tokens, as an expert gets them."""

    def forward(self, x):
        return self.linear(x.flatten(0, 1)[::4])


def test_a_layer_inside_that_sees_rows_and_tokens_flattened_is_routed() -> None:
    model = routed(Flattening(), target_modules=["linear"])
    x = torch.randn(3, 5, 8)
    set_task_ids(model, [2, 0, 1])
    out = model(x)
    set_task_ids(model, 0)
    torch.testing.assert_close(model(x[1:2])[0], out[1])


def test_a_layer_inside_that_sees_other_rows_raises() -> None:
    model = routed(Shuffling(), target_modules=["linear"])
    set_task_ids(model, [2, 0, 1])
    with pytest.raises(RoutingError, match="3 task ids for 4 rows of a layer's input"):
        model(torch.randn(3, 5, 8))
    set_task_ids(model, 1)  # one task: no row is in doubt
    model(torch.randn(3, 5, 8))


# Generation.


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "beams", "returned beams", "samples"],
)
@pytest.mark.parametrize("kind", ["llama", "t5", "plain wrapper"])
def test_generation_of_a_mixed_batch_equals_its_rows_alone(kind: str, how: dict) -> None:
    task_type = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "plain wrapper": None}[kind]
    model = routed(tiny_t5() if kind == "t5" else tiny_llama(), task_type=task_type)
    x = tokens()

    def generate(ids, rows) -> torch.Tensor:
        set_task_ids(model, ids)
        torch.manual_seed(5)
        return model.generate(input_ids=rows, max_new_tokens=4, min_new_tokens=4, **how)

    mixed = generate([2, 0, 1], x)
    if how.get("do_sample"):  # each row's draws depend on the others'
        assert mixed.shape[0] == 9
        return
    k = how.get("num_return_sequences", 1)
    for row, task in enumerate([2, 0, 1]):
        assert torch.equal(mixed[row * k : (row + 1) * k], generate(task, x[row : row + 1]))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generate_takes_the_ids_itself_and_leaves_those_of_before(kind: str) -> None:
    base, task_type = (tiny_t5(), "SEQ_2_SEQ_LM") if kind == "t5" else (tiny_llama(), "CAUSAL_LM")
    model = routed(base, task_type=task_type)
    x = tokens()
    set_task_ids(model, [2, 0, 1])
    expected = model.generate(input_ids=x, max_new_tokens=4, num_beams=2)
    set_task_ids(model, 1)
    assert torch.equal(
        model.generate(input_ids=x, max_new_tokens=4, num_beams=2, task_ids=[2, 0, 1]), expected
    )
    inputs = {"decoder_input_ids": tokens(3, 4)} if kind == "t5" else {}
    before = logits(model, x, **inputs)
    set_task_ids(model, [1, 1, 1])
    torch.testing.assert_close(logits(model, x, **inputs), before)


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_alone_sees_ids_and_parameters_of_now(training: bool) -> None:
    """T5's generate calls the encoder without the model's forward, in training mode too."""
    model, x = routed(tiny_t5(), task_type="SEQ_2_SEQ_LM").train(training), tokens()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for ids in ([2, 0, 1], [1, 1, 0]):
        set_task_ids(model, ids)
        model(input_ids=x, labels=x).loss.backward()  # leaves what one forward leaves
        optimiser.step()
        written = model.generate(input_ids=x, max_new_tokens=4, min_new_tokens=4)
        states = model.get_encoder()(input_ids=x).last_hidden_state
        for row, task in enumerate(ids):
            set_task_ids(model, task)
            fresh = copy.deepcopy(model).eval()
            one = x[row : row + 1]
            assert torch.equal(
                fresh.generate(input_ids=one, max_new_tokens=4, min_new_tokens=4)[0], written[row]
            )
            torch.testing.assert_close(fresh.get_encoder()(input_ids=one).last_hidden_state[0], states[row])
        set_task_ids(model, ids)
        states.square().sum().backward()


# Checkpointing.


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("noise", ["none", "example", "task"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(
    kind: str, noise: str, use_reentrant: bool
) -> None:
    base = tiny_t5 if kind == "t5" else tiny_llama

    def run(checkpointed: bool):
        model = routed(base(), noise=noise).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        set_task_ids(model, [2, 0, 2])
        torch.manual_seed(9)
        loss = model(input_ids=tokens(), labels=tokens(seed=3)).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    (loss, gradients), (same_loss, same_gradients) = run(False), run(True)
    torch.testing.assert_close(same_loss, loss)
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        torch.testing.assert_close(same_gradients[name], gradient, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_by_hand_works_too(use_reentrant: bool) -> None:
    model = routed(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)), target_modules=["0", "1"])
    x = torch.randn(3, 5, 8, requires_grad=True)
    set_task_ids(model, [0, 1, 2])
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    model(x)  # leaves what one forward leaves
    inner = model.base_model.model

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(
                inner[1], checkpoint(inner[0], x, use_reentrant=use_reentrant), use_reentrant=use_reentrant
            )

    out = Checkpointed()(x)
    out.square().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_whole_model_can_be_one_checkpoint(use_reentrant: bool) -> None:
    model = route_by_batch(routed(noise="example")).train()
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=inputs, task_ids=[0, 1, 2]).logits.square()

    found = []
    for run in (forward, lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        torch.manual_seed(5)
        run(embedded).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, got in zip(*found, strict=True):
        torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_forwards_under_checkpointing_keep_their_own_ids_for_one_backward(use_reentrant: bool) -> None:
    def run(checkpointed: bool):
        model = routed(noise="example").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(9)
        losses = []
        for ids, seed in (([2, 0, 1], 2), ([1, 1, 0], 4)):
            set_task_ids(model, ids)
            losses.append(model(input_ids=tokens(seed=seed), labels=tokens(seed=3)).loss)
        sum(losses).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = run(False)
    for name, gradient in run(True).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
