"""What is fuzzed: every kind of file that the compiler reads, through the functions that its commands read it with."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
from fuzz_mutate import mutate_bytes, mutate_json_text, mutate_one, mutate_safetensors, mutate_zip
from tiny_models import TinyModel, llama, lone_site, program_of, student_of

from tcal_compiler import recorded
from tcal_compiler.api import write_report
from tcal_compiler.passes.choose import plan_from_toml
from tcal_compiler.passes.types import SiteScan
from tcal_compiler.progress import Progress
from tcal_compiler.runtime import data
from tcal_compiler.runtime.program_file import load_program, save_program
from tcal_compiler.runtime.run_folder import RunFolder
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.session_state import SessionState
from tcal_compiler.runtime.teacher import load_teacher, load_tokenizer
from tcal_compiler.runtime.tokenizer import ByteTokenizer, read_tokenizer
from tcal_compiler.runtime.training import Checkpoint, TrainState
from tcal_compiler.runtime.weights import load_weights, save_weights

SMALL_TEXT = "The old man said that he would come.\nHe did not.\n" * 40
SCAN = SiteScan(tuple(replace(lone_site(), index=i) for i in range(4)), ())


@dataclass(frozen=True)
class Target:
    """make: a mutated input, as files by name. read: what a command does with them, in the folder that holds them.

    share: of a thousand inputs of a whole run. seeds: inputs that are not mutated, which reading has to accept.
    """

    name: str
    share: int
    make: Callable[[Random], dict[str, bytes]]
    read: Callable[[Path], None]
    seeds: tuple[dict[str, bytes], ...] = ()


def read_manifest(folder: Path) -> None:
    """Everything that commands read of a manifest, then two stages that are committed."""
    with RunFolder.open_existing(folder) as run:
        run.verify_files()
        recorded.plan_of(run, SCAN)
        recorded.local_window_of(run)
        recorded.recorded_sites(run)
        recorded.calibrated_texts(run)
        recorded.calibration_length(run)
        recorded.teacher_info(run)
        recorded.training_checks(run)
    with RunFolder.open_existing(folder, write=True) as run:
        write_report(run, Progress(quiet=True))
        with run.stage("calibrate", config="other", inputs=0) as stage:
            (stage.dir / "initial.safetensors").write_bytes(b"new")


def _read_text(folder: Path) -> None:
    for file in folder.iterdir():
        ids = data.encode_documents(data.read_text(file), ByteTokenizer(), None)
        data.paragraph_hashes(file)
        data.pack(ids, sequences=2, length=8, what=str(file))
        data.check_not_calibrated(file, {"a": "0"}, {"a": ["0"]})


def _read_tokenizer(folder: Path) -> None:
    tokenizer = read_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("The old man, \u00e9\u4e2d", special=True))


def _read_onnx(folder: Path) -> None:
    session = OnnxSession(folder, threads=1)
    list(session.generate([1, 2, 3], 2))


def _read_state(folder: Path) -> None:
    SessionState.load(folder / "state.npz")


def _read_gguf(folder: Path) -> None:
    load_tokenizer(load_teacher(str(folder / "model.gguf")))


def run_folder_files(run: Path) -> dict[str, bytes]:
    """A finished run with contents of a few bytes and their right hashes."""
    manifest = json.loads((run / "tcal.json").read_text())
    files = {rel: rel.encode() for stage in manifest["stages"].values() for rel in stage["files"]}
    for stage in manifest["stages"].values():
        stage["files"] = {rel: hashlib.sha256(files[rel]).hexdigest() for rel in stage["files"]}
        stage["made_from"] = {}  # of the files before
    return files | {"tcal.json": json.dumps(manifest).encode()}


def _texts() -> dict[str, bytes]:
    import pyarrow
    import zstandard
    from pyarrow import parquet

    lines = "".join(json.dumps({"text": line}) + "\n" for line in SMALL_TEXT.splitlines()).encode()
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": SMALL_TEXT.splitlines()}), table)
    packed = zstandard.ZstdCompressor().compress(lines)
    return {"a.txt": SMALL_TEXT.encode(), "a.jsonl": lines, "a.jsonl.zst": packed, "a.parquet": table.getvalue()}


def small_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 300 entries with two special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator(SMALL_TEXT.splitlines(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def each_alone(files: dict[str, bytes]) -> tuple[dict[str, bytes], ...]:
    return tuple({name: content} for name, content in files.items())


def one_file(rng: Random, files: dict[str, bytes], mutate: Callable[..., bytes]) -> dict[str, bytes]:
    """One of the files, mutated, alone."""
    name = rng.choice(list(files))
    return {name: mutate(rng, files[name])}


def _read_plan(folder: Path) -> None:
    plan_from_toml(folder / "plan.toml", SCAN)


def _read_program(folder: Path) -> None:
    load_program(folder / "model.pt2", allow_pickle=False)


def _read_checkpoint(folder: Path) -> None:
    load_teacher(str(folder))


def run_targets(run: Path, work: Path) -> list[Target]:
    """The files of a run folder, with seeds of a finished one and of a small student."""
    student = student_of(layers=1)
    save_weights(student, work / "weights.safetensors")
    Checkpoint(work / "align.safetensors").save(TrainState(3, dict(student.state_dict()), [{"step": 0}]))
    tensors = {n: (work / n).read_bytes() for n in ("weights.safetensors", "align.safetensors")}
    onnx = {n: (run / "onnx" / n).read_bytes() for n in ("model.onnx", "genai_config.json")}
    values = (np.ones((1, 2, 3, 4), np.float32), np.ones((1, 2, 4, 4), np.float16))
    SessionState(3, np.ones((1, 3), np.int64), values, "model").save(work / "state.npz")
    state = {"state.npz": (work / "state.npz").read_bytes()}
    manifest, plan, name = run_folder_files(run), {"plan.toml": (run / "plan.toml").read_bytes()}, "tcal.json"

    def read_tensors(folder: Path) -> None:
        if (folder / "weights.safetensors").exists():
            load_weights(student, folder / "weights.safetensors")
        else:
            Checkpoint(folder / "align.safetensors").load()

    def new_manifest(rng: Random) -> dict[str, bytes]:
        return manifest | {name: mutate_json_text(rng, manifest[name])}

    def new_tensors(rng: Random) -> dict[str, bytes]:
        return one_file(rng, tensors, mutate_safetensors)

    return [
        Target("manifest", 60, new_manifest, read_manifest, (manifest,)),
        Target("plan.toml", 270, lambda rng: one_file(rng, plan, mutate_bytes), _read_plan, (plan,)),
        Target("safetensors", 235, new_tensors, read_tensors, each_alone(tensors)),
        Target("onnx", 35, lambda rng: onnx_input(rng, onnx), _read_onnx, (onnx,)),
        Target("state", 20, lambda rng: one_file(rng, state, mutate_zip), _read_state, (state,)),
    ]


def teacher_targets(work: Path) -> list[Target]:
    """The files of a teacher and of its calibration, with seeds of small models."""
    save_program(program_of(TinyModel(layers=1)), work / "model.pt2")
    llama(num_hidden_layers=1).save_pretrained(work / "llama")
    small_tokenizer(work / "tokenizer")
    program, texts = {"model.pt2": (work / "model.pt2").read_bytes()}, _texts()
    checkpoint, tokenizer = _contents(work / "llama"), _contents(work / "tokenizer")

    def new_tokenizer(rng: Random) -> dict[str, bytes]:
        return mutate_one(rng, tokenizer, list(tokenizer))

    def new_checkpoint(rng: Random) -> dict[str, bytes]:
        return mutate_one(rng, checkpoint, list(checkpoint))

    targets = [
        Target("text", 270, lambda rng: one_file(rng, texts, mutate_bytes), _read_text, each_alone(texts)),
        Target("tokenizer", 50, new_tokenizer, _read_tokenizer, (tokenizer,)),
        Target("pt2", 30, lambda rng: one_file(rng, program, mutate_zip), _read_program, (program,)),
        Target("checkpoint", 15, new_checkpoint, _read_checkpoint, (checkpoint,)),
    ]
    gguf = gguf_seed(work)
    if gguf is not None:
        files = {"model.gguf": gguf}
        targets.append(Target("gguf", 15, lambda rng: one_file(rng, files, mutate_gguf), _read_gguf, (files,)))
    return targets


def make_targets(run: Path, work: Path) -> list[Target]:
    """All targets. run: a finished run folder of a model with four layers. work: an empty folder for seeds."""
    return run_targets(run, work) + teacher_targets(work)


def mutate_gguf(rng: Random, data: bytes) -> bytes:
    """Mostly the head, which says what the rest is."""
    return mutate_bytes(rng, data, head=rng.choice([400, 9000, None]))


def onnx_input(rng: Random, files: dict[str, bytes]) -> dict[str, bytes]:
    """The configuration, the protobuf's bytes, or the decoded model mutated."""
    kind = rng.random()
    if kind < 0.2:
        return files | {"genai_config.json": mutate_json_text(rng, files["genai_config.json"])}
    if kind < 0.5:
        return files | {"model.onnx": mutate_bytes(rng, files["model.onnx"], head=rng.choice([3000, None]))}
    import onnx

    model = onnx.load_from_string(files["model.onnx"])
    graph = model.graph
    for _ in range(rng.randint(1, 3)):
        node, weight = rng.choice(graph.node), rng.choice(graph.initializer)
        edit = rng.randrange(8)
        if edit == 0:
            node.op_type = rng.choice(["Add", "Reshape", "Gather", "LinearAttention", "Loop", "x", ""])
        elif edit == 1 and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice([*rng.choice(graph.node).output, "", "none"])
        elif edit == 2 and node.attribute:
            rng.choice(node.attribute).i = rng.choice([-1, 0, 2**31, 2**62, -(2**62)])
        elif edit == 3 and weight.dims:
            weight.dims[rng.randrange(len(weight.dims))] = rng.choice([0, -1, 1, 2**31, 2**62])
        elif edit == 4:
            weight.data_type = rng.randrange(30)
        elif edit == 5:
            weight.ClearField("raw_data")
            weight.data_location = onnx.TensorProto.EXTERNAL
            place = rng.choice(["../../outside/secret", "/etc/passwd", "model.onnx", "none", ""])
            weight.external_data.add(key="location", value=place)
            weight.external_data.add(key="length", value=rng.choice(["16", "-1", str(2**62)]))
        elif edit == 6:
            del graph.node[rng.randrange(len(graph.node))]
        else:
            info = rng.choice([*graph.input, *graph.output])
            rng.choice([d for d in info.type.tensor_type.shape.dim]).dim_value = rng.choice([0, 1, 7, 2**31, 2**62])
    return files | {"model.onnx": model.SerializeToString()}


def gguf_seed(work: Path) -> bytes | None:
    """A tiny Llama in GGUF where the gguf package is installed."""
    if importlib.util.find_spec("gguf") is None:
        return None
    from tiny_gguf import write_llama

    return write_llama(work / "seed.gguf").read_bytes()


def put(folder: Path, files: dict[str, bytes]) -> None:
    """A folder with exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
