"""The training loss against plain cross-entropy and KL divergence, over all families."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from families import FAMILIES, VOCABULARY, tiny_model, token_ids
from flexigpt.recovery import head
from flexigpt.recovery.head import Head
from flexigpt.recovery.training import token_loss


def reference(
    logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | None, weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    entropy = F.cross_entropy(logits, targets, reduction="sum")
    divergence = torch.zeros(())
    if teacher is not None:
        divergence = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")
    return (1 - weight) * entropy + weight * divergence, entropy, divergence


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_value_and_gradient_are_those_of_the_plain_loss(weight: float) -> None:
    torch.manual_seed(0)
    raw = torch.randn(13, VOCABULARY, dtype=torch.float32, requires_grad=True)
    targets = torch.randint(VOCABULARY, (13,))
    teacher = torch.randn(13, VOCABULARY) if weight else None
    expected = reference(raw, targets, teacher, weight)
    (slope,) = torch.autograd.grad(expected[0] * 0.25, raw)
    found = token_loss(raw * 1.0, targets, scale=0.25, teacher_logits=teacher, distill_weight=weight)
    found.loss.backward()
    torch.testing.assert_close(found.loss.float(), expected[0] * 0.25)
    torch.testing.assert_close(found.cross_entropy.float(), expected[1])
    torch.testing.assert_close(found.divergence.float(), expected[2])
    torch.testing.assert_close(raw.grad, slope)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_backward_pass_allows_the_gradient_in_the_logits_place(family: str) -> None:
    """A family that kept its logits for the backward pass would be refused by autograd, or have other gradients."""
    model = tiny_model(family)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(input_ids=ids).logits[:, :-1]
    count = ids[:, 1:].numel()
    token_loss(logits.flatten(0, 1), ids[:, 1:].flatten(), scale=1 / count).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, msg=name)


def test_the_gradient_takes_the_logits_own_memory() -> None:
    raw = torch.randn(4, VOCABULARY, requires_grad=True)
    logits = raw * 1.0
    seen: list[int] = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    token_loss(logits, torch.zeros(4, dtype=torch.int64)).loss.backward()
    assert seen == [logits.data_ptr()]
    assert raw.grad is not None


def test_a_model_that_kept_its_logits_is_refused_not_given_wrong_gradients() -> None:
    raw = torch.randn(4, VOCABULARY, requires_grad=True)
    loss = token_loss(raw.tanh(), torch.zeros(4, dtype=torch.int64)).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("tokens", [1, 5, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_some_tokens_at_a_time_train_as_all_at_once(
    family: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the family does to its logits, and whether or not its head is trained, alone or as embeddings, too."""
    monkeypatch.setattr(head, "_LEAST_TOKENS", tokens)
    monkeypatch.setitem(head._CHUNK_BUDGET, "cpu", 1)
    model, ids = tiny_model(family), token_ids()
    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    targets, parts, sizes = ids[:, 1:].flatten(), Head(model), list[int]()

    def run(forward: Any) -> Any:
        def loss_of(chunk: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            logits = parts.logits(chunk, forward)
            sizes.append(len(logits))
            found = token_loss(logits, targets[rows], scale=1 / len(targets))
            return found.loss, found.cross_entropy

        return parts.loss_in_chunks(parts.hidden(ids[:, :-1]).flatten(0, 1), loss_of)

    loss, entropy = parts.instead(model, ids[:, :-1], run)
    assert max(sizes) == min(tokens, len(targets))
    torch.testing.assert_close(loss.float(), expected)
    torch.testing.assert_close(entropy.float() / len(targets), expected)
    loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, msg=name)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
