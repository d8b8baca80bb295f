"""The peer's sides: TRL's trainers on the exported weights, taking turns inside a callback."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import world
from benchmarks.turn import Turn, memory

NEEDS = ("torch", "transformers", "trl", "datasets")


def sft(
    turn: Turn,
    folder: str,
    data: dict[str, Any],
    batch: int,
    threads: int,
    drop: int = 3,
    check: bool = True,
    out: str = "",
    **flags: Any,
) -> None:
    """TRL's SFTTrainer; ``flags`` go to SFTConfig (``loss_type``, ``padding_free``)."""
    begun = _torch(threads)
    from trl import SFTConfig, SFTTrainer

    rows = [_labelled(row) for row in world.rows(**_data(data))]
    flags = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, **flags}
    model = _model(folder)
    info: dict[str, float] = {"idle": memory("VmRSS")}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**_arguments(batch), **flags),
        train_dataset=_dataset(rows),
        processing_class=_tokenizer(data["vocab"]),
    )
    _train(turn, trainer, batch, drop, _labels, begun, check, info, out)


def dpo(
    turn: Turn,
    folder: str,
    data: dict[str, Any],
    batch: int,
    threads: int,
    reference: str = "",
    drop: int = 3,
    check: bool = True,
    out: str = "",
    **flags: Any,
) -> None:
    """TRL's DPOTrainer; without ``reference`` the reference is the model itself, as it starts.

    ``flags`` go to DPOConfig (``precompute_ref_log_probs``); the seconds of that pass over the
    data are said in ``reference_cpu`` and ``reference_wall``.
    """
    begun = _torch(threads)
    from trl import DPOConfig, DPOTrainer

    model, other = _model(folder), _model(reference) if reference else None
    info: dict[str, float] = {"idle": memory("VmRSS")}

    class Trainer(DPOTrainer):
        """Takes rows of token ids as they are, and times the reference pass."""

        def _prepare_dataset(self, dataset, *_: Any, **__: Any):
            return dataset

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any):
            wall, cpu = time.perf_counter(), time.process_time()
            out = super()._precompute_ref_logps(*args, **kwargs)
            info["reference_wall"] = time.perf_counter() - wall
            info["reference_cpu"] = time.process_time() - cpu
            return out

    pairs = world.pairs(**_data(data))
    trainer = Trainer(
        model=model,
        ref_model=other,
        args=DPOConfig(
            **_arguments(batch), max_length=data["lengths"]["longest"], beta=world.BETA, **flags
        ),
        train_dataset=_dataset([{f"{k}_ids": ids for k, ids in pair.items()} for pair in pairs]),
        processing_class=_tokenizer(data["vocab"]),
    )

    def count(inputs: Any) -> int:
        return len(inputs["input_ids"]) // 2

    _train(turn, trainer, batch, drop, count, begun, check, info, out)


def gkd(
    turn: Turn,
    folder: str,
    teacher: str,
    data: dict[str, Any],
    batch: int,
    threads: int,
    beta: float,
    drop: int = 3,
    check: bool = True,
    out: str = "",
) -> None:
    """TRL's GKDTrainer off-policy (lmbda 0) at temperature 1, on the tokens of the data.

    Its beta 0 is KL(teacher, student), forward; 1 is KL(student, teacher), reverse; between them
    the mixture is beta teacher + (1 - beta) student.
    """
    begun = _torch(threads)
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    settings = {"lmbda": 0.0, "beta": beta, "temperature": 1.0, "seq_kd": False}
    model, large = _model(folder), _model(teacher)
    info: dict[str, float] = {"idle": memory("VmRSS")}
    trainer = GKDTrainer(
        model=model,
        teacher_model=large,
        args=GKDConfig(**_arguments(batch), max_length=None, **settings),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=world.PAD),
        train_dataset=_dataset([_labelled(row) for row in world.rows(**_data(data))]),
        processing_class=_tokenizer(data["vocab"]),
    )
    _train(turn, trainer, batch, drop, _labels, begun, check, info, out)


def _torch(threads: int) -> float:
    """Threads; returns the time at the start."""
    begun = time.perf_counter()
    os.environ["WANDB_DISABLED"] = "true"
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    transformers.utils.logging.set_verbosity_error()
    return begun


def _data(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"lengths": world.Lengths(**data["lengths"])}


def _model(folder: str):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _tokenizer(vocab: int):
    """A tokenizer of the right size; nothing is tokenised with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t3")
    special = {"pad_token": "t0", "bos_token": "t1", "eos_token": "t2", "unk_token": "t3"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special)


def _dataset(rows: list[dict[str, Any]]):
    from datasets import Dataset

    return Dataset.from_list(rows)


def _labelled(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """Token ids, and labels that leave the prompt out of the loss."""
    prompt, completion = row["prompt"], row["completion"]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def _labels(inputs: Any) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def _arguments(batch: int) -> dict[str, Any]:
    """What the trainers share: the numbers of ours, nothing saved, nothing recomputed."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="benchmark-trl-"),
        "per_device_train_batch_size": batch,
        "learning_rate": world.LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": world.CLIP,
        "weight_decay": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "num_train_epochs": 100_000,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 0,
    }


def _train(
    turn: Turn,
    trainer: Any,
    batch: int,
    drop: int,
    weigh: Callable[[Any], int],
    begun: float,
    check: bool,
    info: dict[str, float],
    out: str,
) -> None:
    """Take turns at the ends of updates; ``drop`` updates, at least 1, come before the first.

    Says ``loss0``, the mean loss over the data at the first weights (if ``check``), and
    ``first_step``, seconds from ``begun`` to the first update's end. With ``out`` nothing is
    trained: the gradient of the first batch goes to that file.
    """
    from transformers import TrainerCallback

    if out:
        turn.ready(**_gradient(trainer, out))
        return
    info = dict(info or {}) | ({"loss0": _loss(trainer, weigh)} if check else {})

    class Gate(TrainerCallback):
        """Stops between updates until the harness says how many more to do."""

        left: int | None = None

        def on_step_end(self, args, state, control, **_: Any) -> None:
            """Count, answer, wait."""
            if state.global_step == 1:
                info["first_step"] = time.perf_counter() - begun
            if self.left is None:
                if state.global_step < drop:
                    return
                turn.ready(**info)
            else:
                self.left -= 1
                if self.left:
                    return
                turn.done(units=self.steps * batch)
            self.steps = self.left = turn.wait()
            if self.left is None:
                os._exit(0)  # the trainer has no way out that does no further work

    trainer.add_callback(Gate())
    trainer.train()


def _gradient(trainer: Any, out: str) -> dict[str, float]:
    """Save the gradient of the loss of the first batch under the weights' names."""
    from safetensors.torch import save_file

    trainer.model.train()  # no dropout in these models
    inputs = next(iter(_batches(trainer)))
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    named = trainer.model.named_parameters()
    save_file({name: p.grad.contiguous() for name, p in named if p.grad is not None}, out)
    return {"loss0": float(loss)}


def _batches(trainer: Any):
    """The data in order, through the trainer's own collator."""
    import torch

    return torch.utils.data.DataLoader(
        trainer.train_dataset,
        batch_size=trainer.args.per_device_train_batch_size,
        collate_fn=trainer.data_collator,
    )


def _loss(trainer: Any, weigh: Callable[[Any], int]) -> float:
    """Mean loss over the data, by the trainer's own collator and loss."""
    import torch

    total = weight = 0.0
    trainer.model.eval()
    with torch.no_grad():
        for inputs in _batches(trainer):
            count = weigh(inputs)
            total += float(trainer.compute_loss(trainer.model, dict(inputs))) * count
            weight += count
    trainer.model.train()
    return total / weight
