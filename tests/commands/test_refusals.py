"""Command lines that are refused: each in one sentence that names the key, with status 2 and nothing left behind."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_sparse import cli
from lit_sparse.callbacks.checkpointing import LastCheckpoint
from lit_sparse.library_errors import understood
from tests.test_runs import F

DATA = F[: F.index("--samples=0")]
REFUSED = {
    # Keys
    "misspelt option": (
        ["--trainer.max_stepz=3"],
        "there is no key trainer.max_stepz; did you mean trainer.max_steps?",
    ),
    "misspelt section": (["--modle.lr=3"], "there is no key modle.lr; did you mean model.lr?"),
    "key of the data": (
        ["--data.batchsize=3"],
        "there is no key data.batchsize of Instructions; did you mean data.batch_size?",
    ),
    "key of a method": (
        ["--model.updates+=SMT", "--model.updates.block_siz=8"],
        "did you mean model.updates.block_size?",
    ),
    "key of an adapter": (["--model.updates.config.lora_alfa=8"], "did you mean model.updates.config.lora_alpha?"),
    "key of a callback": (
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.moniter=x"],
        "did you mean trainer.callbacks.monitor?",
    ),
    "key of an optimizer": (
        ["--model.optimizer=torch.optim.SGD", "--model.optimizer.momentun=1"],
        "did you mean model.optimizer.momentum?",
    ),
    "no section": (["--max_steps=3"], "did you mean trainer.max_steps?"),
    "no option": (["stray"], "'stray' belongs to no option"),
    "no value": (["--model.lr"], "--model.lr was given without a value"),
    # Values
    "no number": (["--model.lr=fast"], "model.lr is fast; it must be a number"),
    "a lone key": (["--model.lr=?"], "model.lr is a mapping whose only key is no text; give a plain value"),
    "no whole number": (["--checkpoint_steps=1.5"], "checkpoint_steps is 1.5; it must be a whole number"),
    "no number of the data": (["--data.heldout=many"], "data.heldout is many; it must be a whole number"),
    "none of the choices": (["--model.schedule=linaer"], "it must be linear, cosine or constant; did you mean linear?"),
    "no precision": (["--trainer.precision=nonsense"], "trainer.precision is nonsense; it must be"),
    "no switch": (["--data.packing=perhaps"], "data.packing is perhaps; it must be true or false"),
    "a section": (["--profile=3"], "profile has keys of its own"),
    "no list": (["--model.updates=SMT,LISA"], "model.updates is SMT,LISA; it must be a list"),
    # Classes
    "misspelt method": (
        ["--model.updates+=SMTT"],
        "model.updates is SMTT, and there is no such class; did you mean SMT?",
    ),
    "misspelt data": (["--data=Instrctions"], "did you mean Instructions?"),
    "misspelt callback": (["--trainer.callbacks+=LearningRateMonitr"], "did you mean LearningRateMonitor?"),
    "short logger": (["--trainer.logger=wandb"], "did you mean WandbLogger?"),
    "misspelt optimizer": (["--model.optimizer=Adamm"], "did you mean Adam?"),
    "two optimizers": (["--model.optimizer=AdamW"], "give one of torch.optim.AdamW, lit_sparse.optim.AdamW"),
    "no module": (["--trainer.callbacks+=nowhere.Mine"], "nowhere.Mine, which cannot be imported (No module named"),
    "not in the module": (
        ["--trainer.callbacks+=lit_sparse.callbacks.Densty"],
        "has no attribute 'Densty'); did you mean",
    ),
    "another kind": (["--trainer.callbacks=[lit_sparse.data.Text]"], "lit_sparse.data.Text, which is no Callback"),
    "an argument short": (["--trainer.callbacks+=EarlyStopping"], "EarlyStopping without monitor, which it needs"),
    "no class": (["--trainer.callbacks=[3]"], "trainer.callbacks is 3; give the name of a Callback"),
    # The machine
    "no such accelerator": (["--trainer.accelerator=gppu"], "there is no such accelerator; did you mean gpu?"),
    "no devices": (["--trainer.devices=0"], "trainer.devices is 0, but there are"),
    "negative devices": (["--trainer.devices=-3"], "trainer.devices is -3, but there are"),
    "many devices": (["--trainer.devices=9999"], "trainer.devices is 9999, but there are"),
    "named devices": (["--trainer.devices=x"], "trainer.devices is x, but there are"),
    "no such strategy": (["--trainer.strategy=ddp_foo"], "trainer.strategy is ddp_foo, and there is no such strategy"),
    "no such profiler": (["--trainer.profiler=pytroch"], "there is no such profiler; did you mean pytorch?"),
    "XLA's profiler": (["--trainer.profiler=xla"], "there is advanced, pytorch or simple"),
    # Trainer
    "barebones": (["--trainer.barebones=true"], "trainer.barebones is true, which keeps no log"),
    "endless accumulation": (
        [f"--trainer.accumulate_grad_batches={10**30}"],
        "but it is a number of batches in a step; give 1 to 1,000,000.",
    ),
    "endless warm-up": ([f"--profile.warmup={10**30}"], "it must be at most 1,000,000."),
    "endless time": (
        ["--trainer.max_time=1000000000:00:00:00"],
        "trainer.max_time is 1000000000:00:00:00, longer than Python can count; give days:hours:minutes:seconds",
    ),
    "no accumulation": (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches is 0"),
    "negative clipping": (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val is -1"),
    "nothing to train on": (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches is 0"),
    "clipping to NaN": (["--trainer.gradient_clip_val=.nan"], "trainer.gradient_clip_val is nan"),
    "an epoch of none": (["--trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch is 0"),
    "negative rate": (["--model.lr=-1"], "model.lr is -1.0; it must be a number from 0 on"),
    "warm-up of NaN": (["--model.warmup_steps=.nan"], "model.warmup_steps is nan"),
    "betas": (
        ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.betas=[2,3]"],
        "model.optimizer refuses its settings: Invalid beta parameter at index 0: 2.0",
    ),
    "a weight of NaN": (["--config=deft.yaml", "--model.updates.weight=.nan"], "ActivationDensity: weight is nan"),
    "negative samples": (["--samples=-1"], "samples is -1; it must be 0 or more"),
    "negative checkpoints": (["--checkpoint_steps=-1"], "checkpoint_steps is -1"),
    "negative profile": (["--profile.warmup=-1"], "profile.warmup is -1; it must be 0 or more"),
    "interval of none": (["--trainer.val_check_interval=0"], "trainer.val_check_interval is 0"),
    "long interval": (
        ["--trainer.val_check_interval=100"],
        "Lightning refuses this: `val_check_interval` (100) must be",
    ),
    "negative steps": (["--trainer.max_steps=-5"], "Lightning refuses this: `max_steps` must be"),
    "no time": (["--trainer.max_time=lots"], "Lightning refuses this: `Timer(duration='lots')`"),
    "no clipping": (["--trainer.gradient_clip_algorithm=foo"], "Lightning refuses this: `gradient_clip_algorithm` foo"),
    "monitored in vain": (
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"],
        "EarlyStopping with monitor val_loss, which nothing logs; give one of epoch, grad_norm, heldout_acc",
    ),
    "rates of no logger": (
        ["--trainer.logger=false", "--trainer.callbacks+=LearningRateMonitor"],
        "Lightning refuses this: Cannot use `LearningRateMonitor` callback with `Trainer` that has no logger",
    ),
    # Files
    "misspelt config": (["--config=smtt.yaml"], "--config smtt.yaml was given, but there is no such file here"),
    "nearest config": (["--config", "data/labeled.yaml"], "did you mean data/labelled.yaml?"),
    "config by its last name": (["--config=demo.yaml"], "did you mean trainers/demo.yaml?"),
    "runs in a file": (["--trainer.default_root_dir=rows.jsonl"], "could not be made"),
    "data of a YAML": (["--config={data: rows.jsonl}"], "or give --data rows.jsonl on the command line"),
    "no data": (["--data.train=nowhere.jsonl"], "nowhere.jsonl"),
}


def files() -> list[Path]:
    return sorted(path for path in Path().rglob("*") if path.is_file() and path.parts[0] != "cache")


def refused(capsys, monkeypatch, *words: str) -> str:
    """Return the sentence with which the command refuses `words`; nothing but its input is left."""
    before = files()
    monkeypatch.setattr(sys, "argv", ["lit-sparse", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("lit-sparse: ")
    assert not any(word in lines[-1] for word in ("Union", "NestedArg", "Namespace", "Parser key"))
    assert files() == before
    return lines[-1]


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_a_command_line_that_cannot_work_is_refused_in_a_sentence(home, capsys, monkeypatch, words, message):
    assert message in refused(capsys, monkeypatch, "fit", *F, *words)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]\n" for n in range(1, 10))
YAMLS = {
    "number for a section": ("model: 3.5", "a.yaml has model: 3.5, but model has keys of its own"),
    "list for a section": ("trainer: [1, 2]", "a.yaml has trainer: [1, 2], but trainer has keys of its own"),
    "number for data": ("data: 3", "a.yaml has data: 3, but data has keys of its own"),
    "misspelt key": ("model: {updtes: []}", "there is no key model.updtes; did you mean model.updates?"),
    "misspelt key of the trainer": ("trainer: {max_stepz: 3}", "did you mean trainer.max_steps?"),
    "no section": ("lr: 3", "there is no key lr; did you mean model.lr?"),
    "misspelt task": ("task: Clasifier", "the task 'Clasifier' was asked for"),
    "wrong type": ('trainer:\n  max_steps: "3x"\n', "trainer.max_steps is 3x; it must be a whole number"),
    "misspelt class": ("model:\n  updates:\n  - class_path: SMTT\n", "did you mean SMT?"),
    "misspelt config class": (
        "model:\n  updates+:\n  - class_path: PEFT\n    init_args: {config: {class_path: peft.LoraConfg}}\n",
        "did you mean peft.LoraConfig?",
    ),
    "wrong type in a class": (
        "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {monitor: x, patience: few}\n",
        "trainer.callbacks.patience is few; it must be a whole number",
    ),
    "open bracket": ("model:\n  lr: 1\n  updates: [\n", "a.yaml line 4 is not valid YAML"),
    "tab": ("trainer:\n\tmax_steps: 3\n", "a.yaml line 2 is not valid YAML: found character"),
    "key twice": ("model:\n  lr: 1\n  lr: 2\n", "a.yaml line 3 is not valid YAML: found duplicate key lr"),
    "unknown interpolation": ('model: {lr: "${nope}"}', "a.yaml cannot be read: Interpolation key 'nope' not found"),
    "text": ("just text", "a.yaml has no keys"),
    "nothing": ("", "a.yaml has no keys"),
    "bytes": (b"\xff\xfe\x00", "a.yaml is no text in UTF-8"),
    "nested deeply": ("model: " + 3000 * "[" + 3000 * "]", "a.yaml is nested too deeply"),
    "aliases that multiply": (
        LAUGHS,
        "a.yaml line 1 is not valid YAML: its aliases stand for more than",
    ),
    "a lone key without a name": ("?", "a.yaml is not valid YAML: a key of '?' is no text"),
    "a lone number": ("1:", "a.yaml is not valid YAML: a key of '1:' is no text"),
    "a part of itself": ("model: &all {updates: *all}", "its aliases stand for more than 100,000 values"),
}


@pytest.mark.parametrize(("text", "message"), YAMLS.values(), ids=YAMLS)
def test_a_yaml_that_cannot_work_is_refused_in_a_sentence(home, capsys, monkeypatch, text, message):
    Path("a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(capsys, monkeypatch, "fit", *F, "--config", "a.yaml")


def test_a_pipe_in_place_of_a_yaml_is_not_waited_for(home, capsys, monkeypatch):
    os.mkfifo("a.yaml")
    told = refused(capsys, monkeypatch, "fit", *F, "--config", "a.yaml")
    assert "--config a.yaml is a pipe or a device, which is read more than once; give the path of a YAML." in told


def test_a_models_own_code_is_neither_run_nor_asked_about(home, capsys, monkeypatch):
    config = json.loads(Path("tiny/config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    Path("tiny/config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    Path("tiny/own.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    assert "'tiny' needs code that it brings along" in refused(capsys, monkeypatch, "fit", *F)


def test_cut_off_weights_are_refused_in_a_sentence(home, capsys, monkeypatch):
    weights = Path("tiny/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "the weights of 'tiny' are damaged" in refused(capsys, monkeypatch, "fit", *F)


DEEP = 100_000 * "[" + 100_000 * "]"


@pytest.mark.parametrize("text", ["[]", DEEP], ids=["a list", "nested deeply"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_malformed_file_of_a_model_is_refused_in_a_sentence(home, capsys, monkeypatch, name, text):
    Path("tiny", name).write_text(text)
    assert "'tiny'" in refused(capsys, monkeypatch, "fit", *F)


def test_a_section_without_keys_changes_nothing(home):
    Path("a.yaml").write_text("model:\n#  lr: 1\ndata:\ntrainer:\n")
    cli.run(["fit", *F, "--config", "a.yaml", "--run=lora", "--trainer.max_steps=1"])
    assert "PEFT" in Path("runs/lora-1/config.yaml").read_text()


def test_data_of_ones_own_without_their_class_names_the_yaml(home, capsys, monkeypatch):
    words = ["fit", "--config", "lora.yaml", "--model.base", "tiny", "--data.train", "rows.jsonl"]
    told = refused(capsys, monkeypatch, *words)
    assert "data.train is no key of Embedded, which the data are; name other data first, with --config data/" in told


def test_options_override_yamls_that_come_after_them(home):
    words = ["fit", *F, "--trainer.max_steps=1"]
    Path("a.yaml").write_text("trainer: {max_steps: 3}\n")
    cli.run([*words, "--config", "a.yaml", "--run=lora"])
    assert "max_steps: 1" in Path("runs/lora-1/config.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "runs/x", "--too", "hf"], "there is no key too"),
        (["export", "--to", "hf"], "run is missing; lit-sparse export --help"),
        (["generate", "runs/x"], "no prompt was given; give one or several"),
        (["export", "runs/x", "--to", "gguf"], "to is gguf; it must be hf, delta, adapter or seedlog"),
        (["fit", *F, "--ckpt_path", "runs/x/seedlog.safetensors"], "there is no seed log at runs/x/seedlog.safet"),
        (["validate", *DATA, "--trainer.max_stepz=3"], "did you mean trainer.max_steps?"),
    ],
)
def test_other_verbs_are_refused_alike(home, capsys, monkeypatch, words, message):
    assert message in refused(capsys, monkeypatch, *words)


@pytest.mark.parametrize("saved", [False, True])
def test_a_full_disk_is_a_sentence_that_says_how_to_go_on_if_there_is_a_checkpoint(home, capsys, monkeypatch, saved):
    save = LastCheckpoint.after_batch

    def full(self, trainer):
        if trainer.global_step == 1 and saved:
            save(self, trainer)
        else:
            raise OSError(errno.ENOSPC, "No space left on device", "runs/lora-1/metrics.csv")

    monkeypatch.setattr(LastCheckpoint, "after_batch", full)
    monkeypatch.setattr(sys, "argv", ["lit-sparse", "fit", *F, "--trainer.max_steps=2", "--checkpoint_steps=1"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert "runs/lora-1/metrics.csv: No space left on device; make room or give another path. " in told
    assert ("go on from it with --ckpt_path runs/lora-1/checkpoints/last.ckpt" in told) is saved
    assert ("Then run the command again" in told) is not saved


def test_only_what_lightning_raises_itself_is_the_users():
    assert understood(MisconfigurationException("no")) is not None
    for error in (ValueError("ours"), TypeError("ours"), OSError(errno.ECONNRESET, "not of the disk")):
        assert understood(error) is None
    wrapped = RuntimeError("outside")
    wrapped.__cause__ = MisconfigurationException("within")
    assert "within" in str(understood(wrapped))
