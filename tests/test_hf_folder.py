"""A student's folder of the Hugging Face kind: written, read back, and refused where it is something else."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import TinyModel, program_of

from tcal_compiler import StudentForCausalLM
from tcal_compiler.errors import ConfigError, RunFolderError
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.runtime.hf_files import load_student, open_program, save_student


@pytest.fixture(scope="module")
def model(shared_run: Path) -> StudentForCausalLM:
    return StudentForCausalLM.from_pretrained(shared_run)


@pytest.fixture(scope="module")
def tuned(model: StudentForCausalLM) -> StudentForCausalLM:
    """A copy of the model, one step of training later."""
    tuned = copy.deepcopy(model).train()
    ids = example_ids(2, 16, 256)
    tuned(ids, labels=ids).loss.backward()
    torch.optim.SGD(tuned.parameters(), lr=0.5).step()
    return tuned.eval()


@pytest.fixture(scope="module")
def saved(tuned: StudentForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "saved"
    tuned.save_pretrained(folder)
    tuned.save_pretrained(folder)  # over what is there
    return folder


def test_a_saved_student_is_the_same_bits_again_in_both_graphs(model, tuned, saved):
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(saved)
    assert isinstance(again, StudentForCausalLM) and again.config.name_or_path == str(saved)
    assert again.config.max_position_embeddings == model.config.max_position_embeddings > 0
    ids = example_ids(2, 30, 256)
    with torch.no_grad():
        for options in ({}, {"use_cache": True}):
            assert torch.equal(tuned(ids, **options).logits, again(ids, **options).logits)
        assert (tuned(ids).logits - model(ids).logits).abs().max() > 1e-3
        torch.testing.assert_close(again(ids, use_cache=True).logits, again(ids).logits, rtol=0, atol=1e-4)


def test_a_saved_folder_holds_the_weights_once(model, saved, shared_run):
    names = sorted(p.name for p in saved.iterdir())
    assert names == ["config.json", "generation_config.json", "graph.pt2", "model.safetensors"]
    once = sum(p.numel() * p.element_size() for p in model.parameters())
    assert once <= (saved / "model.safetensors").stat().st_size < 1.2 * once
    assert (saved / "graph.pt2").stat().st_size < 0.7 * (shared_run / "student.pt2").stat().st_size


def test_what_cannot_be_written_leaves_the_folder_as_it_was(model, saved, tmp_path):
    broken = copy.copy(model)
    broken.generation_config = copy.deepcopy(model.generation_config)
    broken.generation_config.temperature = -3.0
    there = shutil.copytree(saved, tmp_path / "there")
    before = {p.name: p.read_bytes() for p in there.iterdir()}
    for folder in (there, tmp_path / "new" / "folder"):
        with pytest.raises(ConfigError, match=r"a configuration cannot be written: .*temperature"):
            broken.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in there.iterdir()} == before and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_tied_weights_are_written_once_and_tied_again(tmp_path):
    from safetensors import safe_open

    opened = open_program(program_of(TinyModel(tied=True)))
    (names,) = [names for names in opened.ties if len(names) > 1]
    save_student(opened, tmp_path, context=64)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert set(names) & set(f.keys()) == {names[0]}
    again = load_student(tmp_path, context=64)
    assert again.ties == opened.ties
    one, other = (dict(o.capture.gm.named_parameters()) for o in (opened, again))
    assert list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)
    assert len(one) == len(opened.ties)


def _empty(folder: Path, saved: Path) -> None:
    folder.mkdir()


def _foreign_graph(folder: Path, saved: Path) -> None:
    shutil.copytree(saved, folder)
    with (folder / "graph.pt2").open("ab") as f:
        f.write(b"more")


def _damaged_weights(folder: Path, saved: Path) -> None:
    shutil.copytree(saved, folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def _without(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, saved: Path) -> None:
        shutil.copytree(saved, folder)
        (folder / name).unlink()

    return make


def _damaged_config(folder: Path, saved: Path) -> None:
    shutil.copytree(saved, folder)
    (folder / "config.json").write_text("{")


def _config(**values: object) -> Callable[[Path, Path], None]:
    def make(folder: Path, saved: Path) -> None:
        shutil.copytree(saved, folder)
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | values))

    return make


def _other_vocabulary(folder: Path, saved: Path) -> None:
    shutil.copytree(saved, folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"vocab_size": 256', '"vocab_size": 300'))


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda folder, saved: None, "no such folder"),
        (_empty, "no run folder and holds no saved student"),
        (_foreign_graph, "of another student"),
        (_damaged_weights, "another sha256"),
        (_without("graph.pt2"), "graph.pt2: is missing"),
        (_without("model.safetensors"), "model.safetensors: is missing"),
        (_without("config.json"), "configuration is damaged or missing"),
        (_config(vocab_size=-1), r"vocab_size is '-1' in its config\.json"),
        (_config(vocab_size=True), "vocab_size is 'True'"),
        (_config(model_type="llama"), "model_type is 'llama'"),
        (_config(eos_token_id=[3, 256]), "eos_token_id is"),
        (_config(pad_token_id="x"), "pad_token_id is 'x'"),
        (_config(max_position_embeddings=1 << 70), r"max_position_embeddings is \d+ in its config.json, and was"),
        (_damaged_config, "configuration is damaged"),
        pytest.param(_other_vocabulary, "vocab_size is 300", marks=pytest.mark.slow),
    ],
)
def test_folders_that_hold_no_student_are_refused(saved, tmp_path, make, reason):
    make(tmp_path / "folder", saved)
    with pytest.raises(RunFolderError, match=reason):
        StudentForCausalLM.from_pretrained(tmp_path / "folder")


def test_what_config_json_says_beside_is_not_read(saved, tmp_path, model):
    _config(num_labels=10**30, cache_implementation="x", num_hidden_layers=10**30)(tmp_path / "folder", saved)
    again = StudentForCausalLM.from_pretrained(tmp_path / "folder")
    assert again.config.num_hidden_layers == model.config.num_hidden_layers < 10


def test_a_run_folder_that_was_changed_or_not_exported_is_refused_and_none_is_written_into(finished, model):
    with pytest.raises(RunFolderError, match="is a run folder"):
        model.save_pretrained(finished)
    program = finished / "student.pt2"
    program.write_bytes(program.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match=r"student\.pt2"):
        StudentForCausalLM.from_pretrained(finished)


@pytest.mark.parametrize(
    "option",
    [
        {"dtype": torch.bfloat16},
        {"device_map": "auto"},
        {"device_map": "meta"},
        {"trust_remote_code": True},
        {"attn": "x"},
    ],
    ids=str,
)
def test_options_that_cannot_be_had_are_refused(saved, option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        StudentForCausalLM.from_pretrained(saved, **option)


def test_saving_writes_through_no_link_and_into_no_folder_without_a_name(model, tmp_path):
    with pytest.raises(ConfigError, match="name is empty"):
        model.save_pretrained("")
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("mine")
    (folder / "config.json").symlink_to(outside)
    (folder / "generation_config.json").hardlink_to(outside)
    model.save_pretrained(folder)
    assert outside.read_text() == "mine" and not (folder / "config.json").is_symlink()
