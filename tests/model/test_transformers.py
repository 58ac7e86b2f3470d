"""Classifiers of Hugging Face transformers: heads, ModelOutput, labels, attention and gradient checkpointing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taps_ext import ConfigError, FullConfig, TapsConfig, Task, TaskModel, TrainConfig, Trainer

transformers = pytest.importorskip("transformers")


def vit(**settings) -> nn.Module:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8, num_labels=5, **settings)
    return transformers.ViTForImageClassification(config).eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config).eval()


def pictures(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


@pytest.mark.parametrize(("make", "layers"), [(vit, 2 * 6 + 1), (resnet, 8)])
def test_two_tasks_with_label_sets_of_their_own(make, layers) -> None:
    base = make()
    x = pictures()
    with torch.no_grad():
        before = base(x).logits
    model = TaskModel(base, TapsConfig(lam=0.5)).eval()
    model.add_task("seven", num_classes=7)
    model.add_task("two", num_classes=2)
    with torch.no_grad():
        for _, part, _ in model.state("seven").gated():
            part.change.delta.normal_(0, 0.2)
        assert model(x, task="seven").logits.shape == (4, 7)
        assert model(x, task="two").logits.shape == (4, 2)
        assert torch.equal(model(x).logits, before)
    assert len(model.report("seven").rows) == layers
    plain = copy.deepcopy(model).merge_and_unload("seven")
    with torch.no_grad():
        # The task's weights are rebuilt with the rounding that merging has, and run through the same ops.
        assert torch.equal(plain(pixel_values=x).logits, model(pixel_values=x, task="seven").logits)
    assert [type(module) for module in plain.modules()] == [type(module) for module in make().modules()]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_trainer_learns_and_the_file_loads_back(attention: str, tmp_path) -> None:
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(48) % 3
    x = torch.randn(48, 3, 32, 32, generator=generator) + 1.5 * (y - 1).float()[:, None, None, None]
    base = vit(attn_implementation=attention)
    model = TaskModel(base, TapsConfig(lam=0.1))
    torch.manual_seed(1)
    model.add_task("brightness", num_classes=3)
    config = TrainConfig(epochs=5, batch_size=12, optimizer="adamw", lr=3e-3, out=str(tmp_path))
    results = Trainer(model, {"brightness": Task(train=(x, y), val=(x, y))}, config, quiet=True).fit()
    assert results["brightness"].val["accuracy"] > 0.9
    fresh = TaskModel(vit(attn_implementation=attention)).eval()
    fresh.load_task(tmp_path / "brightness.taps")
    model.eval()
    with torch.no_grad():
        want, got = model(x, task="brightness").logits, fresh(x, task="brightness").logits
    assert torch.equal(got, want)


def test_regression_through_the_logits() -> None:
    x = pictures(24)
    y = x.mean(dim=(1, 2, 3), keepdim=False)[:, None]
    model = TaskModel(vit(), TapsConfig(lam=0.1))
    model.add_task("mean", num_classes=1)
    task = Task(train=(x, y), val=(x, y), loss=F.mse_loss, metrics={})
    config = TrainConfig(epochs=2, batch_size=8, lr=1e-3)
    history = Trainer(model, {"mean": task}, config, quiet=True).fit()["mean"].history
    assert history[-1]["val_loss"] < history[0]["loss"]


def test_labels_of_another_number_of_classes_are_refused() -> None:
    model = TaskModel(vit(), TapsConfig(lam=0.5)).train()
    model.add_task("seven", num_classes=7)
    model.add_task("five", num_classes=5)
    y = torch.tensor([0, 1, 4, 2])
    with pytest.raises(ConfigError, match=r"labels: the base computes its loss over 5 classes and task 'seven' has 7"):
        model(pictures(), task="seven", labels=y)
    x = pictures()
    output = model(x, task="five", labels=y)
    assert torch.equal(output.loss, F.cross_entropy(output.logits, y))


LANGUAGE = {
    "GPT2LMHeadModel": {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "LlamaForCausalLM": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    "T5ForConditionalGeneration": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
}


def language(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = kind.config_class(vocab_size=50, **LANGUAGE[name])
    config.decoder_start_token_id = 0
    return kind(config).eval()


@pytest.mark.filterwarnings("ignore:.*has parameters of its own")
@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_learn_by_their_labels(name: str) -> None:
    """Their loss counts words, whatever `num_labels` says; a head for other words is refused where that is known."""
    base = language(name)
    assert base.config.num_labels == 2
    model = TaskModel(base, TapsConfig(lam=0.01)).train()
    model.add_task("own")
    model.add_task("new", num_classes=50)
    words = torch.randint(1, 50, (2, 6))
    for task in model.tasks:
        optimizer = torch.optim.Adam(model.parameter_groups(task, lr=0.01))
        losses = []
        for _ in range(8):
            loss = model(input_ids=words, labels=words, task=task).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
    model.add_task("few", num_classes=7)
    if name.startswith("T5"):  # whose loss goes by the outputs
        few = words % 7
        output = model(input_ids=words, labels=few, task="few")
        assert torch.equal(output.loss, F.cross_entropy(output.logits.view(-1, 7), few.view(-1)))
        return
    with pytest.raises(ConfigError, match=r"labels: .* loss over 50 classes and task 'few' has 7"):
        model(input_ids=words, labels=words, task="few")
    assert model(input_ids=words, task="few").logits.shape == (2, 6, 7)


def test_a_merged_copy_computes_its_loss_and_loads_back(tmp_path) -> None:
    base, x, y = vit(), pictures(), torch.tensor([0, 1, 6, 2])
    model = TaskModel(base, TapsConfig(lam=0.5)).eval()
    model.add_task("seven", num_classes=7)
    merged = model.merge_and_unload("seven")
    output = merged(x, labels=y)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, y))
    assert base.config.num_labels == base.num_labels == 5
    merged.save_pretrained(tmp_path)
    assert torch.equal(type(base).from_pretrained(tmp_path).eval()(x).logits, output.logits)


@pytest.mark.parametrize("config", [TapsConfig(lam=0.5), FullConfig()])
def test_gradient_checkpointing_changes_no_gradient(config) -> None:
    x = pictures()
    grads = []
    for reentrant in (None, False, True):
        base = vit()
        if reentrant is not None:
            old = getattr(base, "gradient_checkpointing_enable", None)  # renamed in transformers 5
            getattr(base, "activation_checkpointing_enable", old)({"use_reentrant": reentrant})
        model = TaskModel(base, config).train()
        torch.manual_seed(1)
        model.add_task("a", num_classes=3)
        with torch.no_grad():
            for _, part, _ in model.state("a").gated():
                part.change.delta.normal_(0, 0.1)
        model(x.requires_grad_(), task="a").logits.square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for other in grads[1:]:
        assert set(grads[0]) == set(other) and all(torch.equal(other[n], g) for n, g in grads[0].items())


def test_a_model_that_was_adapted_still_saves_its_configuration(tmp_path) -> None:
    base = vit()
    want = {key: value.clone() for key, value in base.state_dict().items()}
    model = TaskModel(base, TapsConfig(lam=0.5))
    model.add_task("seven", num_classes=7)
    model.unload().save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[key], want[key]) for key in want)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]
