"""What every test stands on: no network, one thread unless OMP_NUM_THREADS says more, a cache of its own, and small
preference data of known colours. Tests marked slow are left out, in words, unless --all or -m asks for them."""

import atexit
import os
import shutil
import tempfile

# Read by the libraries at their import, hence before any test module is.
_CACHE = tempfile.mkdtemp(prefix="xdpo-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this process and of those that tests start
# Scripts that tests start import this clone's package, also where the environment has another's.
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ["PYTHONPATH"] = os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = _CACHE
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import http.client  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from xdpo import files  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow too")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    asked = item.config.getoption("--all") or item.config.getoption("-m")
    if item.get_closest_marker("slow") and not asked:
        # Skipped from this one line, hence one line of the summary that counts them.
        pytest.skip("slow tests left out; bash scripts/test.sh --all runs them too")


def forget_accelerators():
    """Begin with a new accelerator: its device, precision and processes are those of the first one in a process."""
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def accelerators_of_its_own():
    """Tests may run in any order."""
    forget_accelerators()


def encoded_image(color="red", size=(16, 16), format="PNG"):
    """Bytes of an image of one colour."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format)
    return buffer.getvalue()


def pick_a_pic_row(number, **changes):
    """A row in the schema of Pick-a-Pic v2. Image 0 is green and preferred, image 1 is red."""
    return {
        "are_different": True,
        "best_image_uid": f"a{number}",
        "caption": f"a photo of {number}",
        "created_at": None,
        "has_label": True,
        "image_0_uid": f"a{number}",
        "image_0_url": "",
        "image_1_uid": f"b{number}",
        "image_1_url": "",
        "jpg_0": encoded_image("lime"),
        "jpg_1": encoded_image("red"),
        "label_0": 1.0,
        "label_1": 0.0,
        "model_0": "one",
        "model_1": "two",
        "ranking_id": 1000 + number,
        "user_id": 1,
        "num_example_per_prompt": 1,
        "__index_level_0__": number,
    } | changes


def write_pick_a_pic(path, rows):
    """Write rows of pick_a_pic_row to a parquet file with the types of Pick-a-Pic v2; returns the path as str."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = dict.fromkeys(rows[0], pa.string()) | {
        "are_different": pa.bool_(),
        "has_label": pa.bool_(),
        "created_at": pa.timestamp("ns"),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "score_0": pa.float64(),
        "score_1": pa.float64(),
        "ranking_id": pa.int64(),
        "user_id": pa.int64(),
        "num_example_per_prompt": pa.int64(),
        "__index_level_0__": pa.int64(),
    }
    schema = pa.schema([(name, types[name]) for name in rows[0]])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A real CLIPTokenizer of 8 tokens' length whose words are letters and digits."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def build_pipeline(folder, tokenizer, prediction_type="epsilon"):
    """Save a Stable Diffusion pipeline of a few thousand weights: 16-pixel images, (4, 8, 8) latents."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    positions = {"max_position_embeddings": tokenizer.model_max_length}
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **text, **ends, **positions)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small_pipeline(tmp_path_factory, tiny_tokenizer):
    return build_pipeline(tmp_path_factory.mktemp("pipeline") / "epsilon", tiny_tokenizer)


@pytest.fixture(scope="session")
def v_prediction_pipeline(tmp_path_factory, tiny_tokenizer):
    return build_pipeline(tmp_path_factory.mktemp("pipeline") / "v", tiny_tokenizer, "v_prediction")


@pytest.fixture(scope="session")
def sd3(tmp_path_factory, tiny_tokenizer):
    """Folder of a small Stable Diffusion 3 pipeline with T5."""
    from flow_pipelines import sd3_pipeline

    return sd3_pipeline(tmp_path_factory.mktemp("sd3") / "sd3", tiny_tokenizer)


@pytest.fixture(scope="session")
def flux(tmp_path_factory, tiny_tokenizer):
    """Folder of a small FLUX.1-dev pipeline."""
    from flow_pipelines import flux_pipeline

    return flux_pipeline(tmp_path_factory.mktemp("flux") / "flux", tiny_tokenizer)


@pytest.fixture(scope="session")
def small_pairs(tmp_path_factory):
    """Twelve pairs in Pick-a-Pic's schema, every image of another colour; path of the parquet file."""
    colours = ["red", "lime", "blue", "white", "black", "yellow", "cyan", "magenta", "gray", "orange", "pink", "brown"]
    rows = [
        pick_a_pic_row(number, jpg_0=encoded_image(colours[number]), jpg_1=encoded_image(colours[(number + 5) % 12]))
        for number in range(len(colours))
    ]
    return write_pick_a_pic(tmp_path_factory.mktemp("pairs") / "train.parquet", rows)


@pytest.fixture
def scored(small_pairs, tmp_path):
    """scored((chosen, rejected), …): the options of a weighted run on small_pairs with these scores, in turn."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def options(*scores, name="scored"):
        table = pq.read_table(small_pairs)
        for side in (0, 1):
            column = [scores[number % len(scores)][side] for number in range(len(table))]
            table = table.append_column(f"score_{side}", pa.array(column, pa.float64()))
        pq.write_table(table, path := tmp_path / f"{name}.parquet")
        return ("loss.margin_weight=10", f"data.path={path}")

    return options


@pytest.fixture
def run(small_pipeline, small_pairs, tmp_path, monkeypatch):
    """Train in this process: run("name", "key=value", …) → (exit status, run folder)."""
    import signal

    from training_runs import ROOT, SMALL_RUN

    import train_xdpo

    monkeypatch.chdir(ROOT)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(name, *overrides):
        forget_accelerators()
        folder = tmp_path / name
        options = [word for word in overrides if word.startswith("--")]
        keys = [word for word in overrides if not word.startswith("--")]
        arguments = ["--config", "configs/base.yaml", *options, *SMALL_RUN]
        paths = [f"model.pipeline={small_pipeline}", f"data.path={small_pairs}", f"output_dir={folder}"]
        try:
            return train_xdpo.main([*arguments, *paths, *keys]), folder
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return call


@contextmanager
def held_elsewhere(folder, work):
    """Another process that writes into a folder: it has the folder's lock in here."""
    holding = (
        "import pathlib, sys\nfrom xdpo import files\n"
        "with files.only_writer(pathlib.Path(sys.argv[1]), sys.argv[2]):\n    print(flush=True)\n    sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-c", holding, str(folder), work], cwd=ROOT, **pipes)
    with holder:
        holder.stdout.readline()
        yield holder
        holder.stdin.close()


def failing(number, function=None, when=lambda *arguments, **options: True):
    """A function that raises the system's error of this number where `when` says so of its arguments."""

    def call(*arguments, **options):
        if when(*arguments, **options):
            raise OSError(number, os.strerror(number))
        return function(*arguments, **options)

    return call


class Answer(io.BytesIO):
    """What urlopen gives; the connection is lost after `content` where `whole` is False."""

    def __init__(self, content, whole=True):
        super().__init__(content)
        self.whole = whole

    def read(self, *size):
        content = super().read(*size)
        if not self.whole:
            raise http.client.IncompleteRead(content, 100)
        return content


@pytest.fixture
def full_disk(monkeypatch):
    """Every file that is written aside meets a full disk."""

    def on_a_full_disk(path):
        aside = path.with_name(f"full.{path.name}{files.PART}")  # a name that isn't swept
        aside.symlink_to("/dev/full")
        return aside

    monkeypatch.setattr(files, "aside_of", on_a_full_disk)


@pytest.fixture(scope="session")
def metric_weights(tmp_path_factory):
    """A weights folder of small metrics, as --weights wants it."""
    import metric_fixtures

    return metric_fixtures.write_weights(tmp_path_factory.mktemp("metrics") / "weights")
