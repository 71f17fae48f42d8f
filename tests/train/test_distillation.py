"""Distillation: the fused loss against its definition, and runs with a real teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from litgpt import GPT, Config
from runs import assert_same_to_the_bit, losses, rows
from test_loss import gradients, peak_bytes
from torch.nn import functional as F

from phi_lit.errors import UserError
from phi_lit.train.distillation import TeacherHead
from phi_lit.train.head_cpu import CpuHead
from phi_lit.train.head_plain import PlainHead
from phi_lit.train.loss import linear_cross_entropy, plain_loss
from phi_lit.train.model import LossModel
from phi_lit.train.teacher import Teacher

# Letters in tensor names: N tokens, D hidden size, V vocabulary.


def tensors(n=70, d=16, v=40, dtype=torch.float32, teacher_d=24):
    """A student's hidden states, weight, bias; the targets; the same three of a teacher."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    student = [x.requires_grad_() for x in (random(n, d), random(v, d), random(v))]
    target_N = torch.randint(0, v, (n,), generator=generator)
    target_N[::7] = -100
    return student, target_N, [random(n, teacher_d), random(v, teacher_d), random(v)]


def slow_double(student, target_N, teacher, *, share, temperature, z_loss=0.0, denominator=None):
    """Write the loss as its definition: whole logits, KL as a sum over the vocabulary."""
    exact = torch.promote_types(student[0].dtype, torch.float32)
    counted_N = target_N != -100
    s_NV = F.linear(*student).to(exact)[counted_N]
    t_NV = F.linear(*teacher).to(exact)[counted_N]
    total = counted_N.sum() if denominator is None else denominator
    p_NV, q_NV = (t_NV / temperature).softmax(1), (s_NV / temperature).softmax(1)
    kl = (p_NV * (p_NV.log() - q_NV.log())).sum() / total
    hit_N = s_NV.gather(1, target_N[counted_N, None]).squeeze(1)
    cross_entropy = (s_NV.logsumexp(1) - hit_N).sum() / total
    z = z_loss * s_NV.logsumexp(1).square().sum() / total
    return (1 - share) * cross_entropy + share * temperature**2 * kl + z


def fused(student, target_N, teacher, *, share, temperature, **options):
    head = TeacherHead(*teacher, share=share, temperature=temperature)
    return linear_cross_entropy(*student, target_N, teacher=head, **options)


# -------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("v", [40, 33])  # 33 cannot be cut into groups
@pytest.mark.parametrize("chunk", [1, 16, 1000])
@pytest.mark.parametrize(
    ("share", "temperature", "z_loss"), [(0.5, 1.0, 0.0), (0.3, 2.5, 0.2), (1.0, 0.7, 0.0)]
)
def test_value_and_gradients_equal_the_definition(v, chunk, share, temperature, z_loss):
    student, target, teacher = tensors(v=v, dtype=torch.float64)
    how = dict(share=share, temperature=temperature, z_loss=z_loss)
    ours = fused(student, target, teacher, chunk=chunk, **how)
    slow = slow_double(student, target, teacher, **how)
    torch.testing.assert_close(ours.loss, slow, rtol=1e-12, atol=1e-14)
    for a, b in zip(gradients(ours.loss, student), gradients(slow, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_gradients_pass_gradcheck():
    student, target, teacher = tensors(n=8, d=4, v=8, dtype=torch.float64)
    how = dict(share=0.4, temperature=1.7, z_loss=0.1, chunk=3)
    assert torch.autograd.gradcheck(lambda *x: fused(x, target, teacher, **how).loss, student)


def test_both_heads_agree():
    (hidden, weight, bias), target, teacher = tensors(n=90, dtype=torch.float64)
    head = TeacherHead(*teacher, share=0.6, temperature=1.5)
    results = [
        kind(
            hidden.detach(), weight.detach(), bias.detach(),
            rows=32, z_loss=0.1, wanted=(True, True, True), teacher=head,
        ).run(target.clamp(min=0), target != -100, torch.tensor(0.25, dtype=torch.float64))
        for kind in (CpuHead, PlainHead)
    ]  # fmt: skip
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-13)


def test_whole_logits_give_the_same_for_heads_that_are_not_linear():
    student, target, teacher = tensors()
    how = dict(share=0.4, temperature=2.0)
    whole = TeacherHead(F.linear(*teacher), None, None, **how)
    plain = plain_loss(F.linear(*student), target, teacher=whole, z_loss=0.1, denominator=50.0)
    ours = fused(student, target, teacher, z_loss=0.1, denominator=50.0, **how)
    slow = slow_double(student, target, teacher, z_loss=0.1, denominator=50.0, **how)
    expected = gradients(slow, student)
    for result in (plain, ours):
        torch.testing.assert_close(result.loss, slow)
        for a, b in zip(gradients(result.loss, student), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name in ("cross_entropy", "z_loss", "divergence"):
        torch.testing.assert_close(getattr(plain, name), getattr(ours, name))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_errs_no_more_than_rounding_the_logits_does(autocast):
    student, target, teacher = tensors(n=512, d=64, v=1000, teacher_d=64, dtype=torch.bfloat16)
    if autocast:
        student = [x.detach().float().requires_grad_() for x in student]
    how = dict(share=0.5, temperature=2.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = fused(student, target, teacher, chunk=128, **how).loss
    exact_student, exact_teacher = (
        [x.detach().double().requires_grad_() for x in part] for part in (student, teacher)
    )
    exact = slow_double(exact_student, target, exact_teacher, **how)
    assert abs(ours - exact) <= 2**-8 * abs(exact)
    for a, b in zip(gradients(ours, student), gradients(exact, exact_student), strict=True):
        assert (a - b).norm() <= 2**-6 * b.norm()


def test_a_teacher_that_is_the_student_adds_no_divergence_and_no_gradient():
    student, target, _ = tensors(dtype=torch.float64)
    same = [x.detach() for x in student]
    result = fused(student, target, same, share=1.0, temperature=3.0)
    assert result.divergence.item() == pytest.approx(0, abs=1e-15)
    assert all(g.abs().max() < 1e-15 for g in gradients(result.loss, student))


def test_micro_batches_with_a_common_denominator_add_up():
    student, target, teacher = tensors(dtype=torch.float64)
    how = dict(share=0.5, temperature=2.0)
    whole = fused(student, target, teacher, **how)
    parts = [
        fused(
            [student[0][part], *student[1:]], target[part], [teacher[0][part], *teacher[1:]],
            denominator=float(whole.count), **how,
        )
        for part in (slice(0, 13), slice(13, 70))
    ]  # fmt: skip
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    torch.testing.assert_close(parts[0].divergence + parts[1].divergence, whole.divergence)


def test_peak_memory_is_at_most_a_fifth_of_whole_logits():
    n, d, v = 2048, 32, 51200
    student, target, teacher = tensors(n, d, v, teacher_d=32)
    results = n * d * 4 + v * d * 4 + v * 4  # the gradients themselves, which any way must make
    how = dict(share=0.5, temperature=2.0)

    def plainly():
        # As a user of PyTorch would write it.
        logits = F.linear(*student)
        with torch.no_grad():
            theirs = F.linear(*teacher)
        soft = F.kl_div(
            F.log_softmax(logits / 2, 1), F.log_softmax(theirs / 2, 1),
            log_target=True, reduction="batchmean",
        )  # fmt: skip
        return 0.5 * F.cross_entropy(logits, target) + 0.5 * 4 * soft

    def measure(loss_of):
        def run():
            loss_of().backward()
            for x in student:
                x.grad = None

        return peak_bytes(run) - results

    plain = measure(plainly)
    ours = measure(lambda: fused(student, target, teacher, **how).loss)
    assert plain > 4 * n * v * 4
    assert ours <= plain / 5


def test_misfits_are_named():
    student, target, (hidden, weight, bias) = tensors()
    with pytest.raises(ValueError, match=r"teacher's logits are \(70, 39\), the student's \(70, 4"):
        fused(student, target, [hidden, weight[1:], bias[1:]], share=0.5, temperature=1.0)
    with pytest.raises(ValueError, match="it knows no teacher"):
        fused(student, target, [hidden, weight, bias], share=0.5, temperature=1.0, backend="liger")


# ------------------------------------------------------------------------------------------- model


def small_gpt(**changes):
    config = dict(
        n_layer=2, n_embd=64, n_head=2, block_size=32, intermediate_size=128,
        padded_vocab_size=512, vocab_size=512,
    )  # fmt: skip
    return GPT(Config.from_name("phi-1_5", **{**config, **changes}))


@pytest.mark.parametrize("capped", ["nobody", "student", "teacher"])
def test_model_with_teacher_equals_two_models_and_the_definition(capped):
    torch.manual_seed(1)
    cap = {"final_logit_softcapping": 2.0}
    gpt = small_gpt(**(cap if capped == "student" else {}))
    other = small_gpt(n_layer=3, n_embd=96, **(cap if capped == "teacher" else {}))
    ids = torch.randint(0, 512, (3, 33))
    idx, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :9] = -100
    s_NV, t_NV = gpt(idx).flatten(0, 1), other(idx).flatten(0, 1)
    eye, zero = torch.eye(512), torch.zeros(512)
    slow = slow_double(
        [s_NV, eye, zero], targets.flatten(), [t_NV.detach(), eye, zero], share=0.3, temperature=2.0
    )
    slow.backward()
    expected = {name: p.grad for name, p in gpt.named_parameters()}
    gpt.zero_grad(set_to_none=True)
    names = list(gpt.state_dict())
    model = LossModel(gpt, teacher=Teacher(other, share=0.3, temperature=2.0))
    loss = model(idx, targets)
    loss.backward()
    torch.testing.assert_close(loss, slow, rtol=1e-5, atol=0)
    found = {name: p.grad for name, p in gpt.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert [name.removeprefix("gpt.") for name in model.state_dict()] == names
    assert all(p.grad is None and not p.requires_grad for p in other.parameters())


def test_the_teacher_sees_documents_as_the_student_does():
    """A row of two documents gives the loss of two rows of one."""
    from phi_lit.train.documents import apply_document_mask

    torch.manual_seed(1)
    gpt, other = small_gpt(), small_gpt(n_embd=96)
    for each in (gpt, other):
        apply_document_mask(each)
    model = LossModel(gpt, teacher=Teacher(other, share=0.6, temperature=2.0))
    ids, targets = torch.randint(0, 512, (1, 24)), torch.randint(0, 512, (1, 24))
    documents = torch.tensor([[0] * 10 + [1] * 14], dtype=torch.int32)
    together = model(ids, targets, 24.0, documents)
    apart = model(ids[:, :10], targets[:, :10], 24.0) + model(ids[:, 10:], targets[:, 10:], 24.0)
    torch.testing.assert_close(together, apart)


def test_the_held_out_loss_knows_no_teacher():
    torch.manual_seed(1)
    gpt, other = small_gpt(), small_gpt()
    ids = torch.randint(0, 512, (2, 33))
    alone = LossModel(gpt).eval()(ids[:, :-1], ids[:, 1:])
    taught = LossModel(gpt, teacher=Teacher(other)).eval()(ids[:, :-1], ids[:, 1:])
    assert torch.equal(alone, taught)


# -------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="session")
def teacher_dir(
    recipe: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model of the same tokenizer, wider than the student, trained for some steps."""
    from runs import pretrain

    out = tmp_path_factory.mktemp("teacher") / "out"
    changes = {"max_steps": 40, "attention_dropout": 0.0, "residual_dropout": 0.0}
    pretrain(recipe(out, train={**changes, "save_interval": 40}, eval={"interval": 40}, seed=3))
    return out / "final"


def distilled(teacher_dir: Path, **train: Any) -> dict[str, Any]:
    return {"train": {"teacher": str(teacher_dir), **train}}


def test_a_run_learns_from_its_teacher_and_resumes_to_the_bit(
    tmp_path: Path, train: Callable[..., Path], teacher_dir: Path
) -> None:
    how = dict(distill_weight=0.7, distill_temperature=2.0)
    whole = train(tmp_path / "whole", **distilled(teacher_dir, **how))
    record = [row for row in rows(whole) if "loss" in row]
    assert record[-1]["divergence"] < record[0]["divergence"]
    for row in record:
        mixed = 0.3 * row["cross_entropy"] + 0.7 * 4 * row["divergence"]
        assert row["loss"] == pytest.approx(mixed, rel=1e-6)
    part = train(tmp_path / "part", **distilled(teacher_dir, **how, max_steps=8, lr_total_steps=12))
    moved = tmp_path / "elsewhere"
    moved.symlink_to(teacher_dir)  # the same weights by another path are the same teacher
    train(part, resume="auto", **distilled(moved, **how, lr_total_steps=12))
    assert losses(part) == losses(whole)
    assert_same_to_the_bit(part / "latest", whole / "latest")
    names = torch.load(whole / "final" / "lit_model.pth", weights_only=True)["model"]
    assert len(names) == len(torch.load(teacher_dir / "lit_model.pth", weights_only=True)["model"])


def test_another_teacher_is_another_run(
    tmp_path: Path, train: Callable[..., Path], teacher_dir: Path
) -> None:
    out = train(tmp_path / "out", **distilled(teacher_dir, max_steps=4, lr_total_steps=12))
    with pytest.raises(UserError, match=r"distillation\.teacher was '\w+' and is '\w+'"):
        train(out, resume="auto", **distilled(out / "final", lr_total_steps=12))
    with pytest.raises(UserError, match=r"distillation was .* and is None"):
        train(out, resume="auto", train={"lr_total_steps": 12})


def test_micro_batches_and_teacher_precision_change_nothing_but_rounding(
    tmp_path: Path, train: Callable[..., Path], teacher_dir: Path
) -> None:
    still = {"attention_dropout": 0.0, "residual_dropout": 0.0, "max_steps": 4}
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    found = [
        losses(train(tmp_path / str(n), optimizer=sgd, **distilled(teacher_dir, **still, **more)))
        for n, more in enumerate(
            ({"micro_batch_size": 8}, {"micro_batch_size": 2}, {"teacher_precision": "bf16-true"})
        )
    ]
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], rel=2**-7)  # bf16 keeps 8 bits of each logit
    assert found[2] != found[0]


@pytest.mark.parametrize("sharded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_sharded_ranks_learn_as_one(
    tmp_path: Path, train: Callable[..., Path], recipe: Callable[..., dict[str, Any]],
    teacher_dir: Path, sharded: bool,
) -> None:  # fmt: skip
    import subprocess
    import sys

    from runs import quiet_environment

    still = {
        "attention_dropout": 0.0, "residual_dropout": 0.0, "max_steps": 4, "micro_batch_size": 2,
        "distill_temperature": 2.0,
    }  # fmt: skip
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    one = train(tmp_path / "one", optimizer=sgd, **distilled(teacher_dir, **still))
    out = tmp_path / "two"
    changes = distilled(teacher_dir, **still, teacher_sharded=sharded)
    config = out.with_suffix(".yaml")
    config.write_text(
        yaml.safe_dump(recipe(out, strategy="fsdp", devices=2, optimizer=sgd, **changes))
    )
    litgpt = str(Path(sys.executable).with_name("litgpt"))
    done = subprocess.run(
        [litgpt, "pretrain", "--config", str(config)],
        env=quiet_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert losses(out) == pytest.approx(losses(one), abs=1e-5)
    divergences = [[row["divergence"] for row in rows(o) if "loss" in row] for o in (out, one)]
    assert divergences[0] == pytest.approx(divergences[1], abs=1e-5)


# --------------------------------------------------------------------------------------- bad input


def test_teachers_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, train: Callable[..., Path], teacher_dir: Path
) -> None:
    def said(**options: Any) -> str:
        with pytest.raises(UserError) as caught:
            train(tmp_path / "out", train=options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    def changed(name: str, change: Callable[[Path], None]) -> str:
        copy = tmp_path / name
        copy.mkdir()
        for file in teacher_dir.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        change(copy)
        return said(teacher=str(copy))

    def configure(**values: Any) -> Callable[[Path], None]:
        def change(copy: Path) -> None:
            path = copy / "model_config.yaml"
            path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))

        return change

    def cut(copy: Path) -> None:
        whole = (copy / "lit_model.pth").read_bytes()
        (copy / "lit_model.pth").write_bytes(whole[: len(whole) // 2])

    def other_words(copy: Path) -> None:
        from phi_lit.data.tokenizer import train_bpe

        train_bpe(["other words entirely, of no use " * 50] * 3, 300, tmp_path / "words")
        for file in (tmp_path / "words").iterdir():
            (copy / file.name).write_bytes(file.read_bytes())

    assert "nowhere does not exist" in said(teacher=str(tmp_path / "nowhere"))
    assert "it lacks lit_model.pth" in changed("empty", lambda c: (c / "lit_model.pth").unlink())
    assert "cut short" in changed("cut", cut)
    text = changed("vocabulary", configure(vocab_size=640, padded_vocab_size=640))
    assert "gives 640 logits, phi1-test 512" in text
    assert "sees 32 tokens, a row has 64" in changed("context", configure(block_size=32))
    assert "has another tokenizer (300 ids)" in changed("tokenizer", other_words)
    text = said(teacher=str(teacher_dir), distill_weight=1.5, distill_temperature=0.0)
    assert "distill_weight is 1.5" in text
    assert "distill_temperature is 0.0" in text
    assert "teacher_sharded needs strategy: fsdp" in said(
        teacher=str(teacher_dir), teacher_sharded=True
    )
    assert "distill_weight is set without a train.teacher" in said(distill_weight=0.5)


def test_a_teacher_larger_than_memory_is_refused_before_its_weights_are_read(
    tmp_path: Path, train: Callable[..., Path], teacher_dir: Path
) -> None:
    large = tmp_path / "large"
    large.mkdir()
    for file in teacher_dir.iterdir():
        (large / file.name).write_bytes(file.read_bytes())
    config = yaml.safe_load((large / "model_config.yaml").read_text())
    (large / "model_config.yaml").write_text(yaml.safe_dump({**config, "intermediate_size": 2**33}))
    with pytest.raises(UserError, match=r"phi1-test beside its teacher's 8,86\d\.\d GB needs"):
        train(tmp_path / "out", **distilled(large))
