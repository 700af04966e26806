"""Command line: `invoke --list`. Each task parses, calls and prints; everything heavy is imported inside."""

import logging
import os
import re
import select
import signal
import sys

from invoke import Collection, Program, task


def _call(f, *args, **kwargs):
    """Run `f`; what a user can cause is one line on stderr and status 2, not a traceback."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    _explain(args)
    # Warnings of torch and others come as log lines, without the line of code that Python prints with each.
    logging.captureWarnings(True)
    try:
        # A log line takes a progress bar away before it is written, and does not land behind it.
        with logging_redirect_tqdm():
            result = f(*args, **kwargs)
        # A closed pipe must show here, where it is handled, and not when Python ends.
        sys.stdout.flush()
        return result
    except (ValueError, FloatingPointError) as e:
        _refuse(str(e))
    except BrokenPipeError as e:
        if not _is_unread():
            _refuse(str(e))
        # Python writes what is left in its buffers at its end, and would complain of the closed pipe.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        sys.exit(128 + signal.SIGPIPE)
    # A full disk, a folder that was removed meanwhile, a file that may not be read.
    except OSError as e:
        message = str(e)
        if e.filename is not None:
            message = f"{e.filename}: {e.strerror}"
        _refuse(message)
    except KeyboardInterrupt:
        # 130 is what a shell gives for Ctrl-C.
        print("stopped; finished work is kept, the same command continues from there", file=sys.stderr)
        sys.exit(130)
    finally:
        logging.captureWarnings(False)


def _is_unread():
    """Whether what is printed goes to a program that has ended, such as `head`.

    A broken pipe may also be that of a worker process or of a download, which is an error like others.
    """
    printed = select.poll()
    for descriptor in (1, 2):
        printed.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in printed.poll(0))


def _refuse(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _whole(name, text, least=0, most=2**31 - 1):
    """A whole number from the command line. Tasks take text: what invoke itself cannot convert ends in a
    traceback.
    """
    try:
        number = int(text)
    except ValueError:
        number = None
    # The upper bound catches a slip of the keyboard here, in the words of the option.
    if number is None or not least <= number <= most:
        _refuse(f"--{name} must be a whole number from {least} to {most}, got {text!r}")
    return number


def _number(name, text, least, most):
    """A number from the command line, as `_whole`."""
    try:
        number = float(text)
    except ValueError:
        number = None
    if number is None or not least <= number <= most:
        _refuse(f"--{name} must be a number from {least} to {most}, got {text!r}")
    return number


def _explain(values):
    """Show what a task takes, or refuse an option that it has not.

    invoke takes both for the value of a positional argument that is missing: `invoke train --help` has the
    experiment "--help".
    """
    flags = [v for v in values if isinstance(v, str) and re.fullmatch("-h|--[a-z][a-z-]*", v)]
    if not flags:
        return
    flag = flags[0]
    tasks = Collection.from_module(sys.modules[__name__])
    # The task is not told to us; it is the first word on the command line that is one.
    name = next((a for a in sys.argv if a in tasks.task_names), "")
    if flag not in ("-h", "--help"):
        _refuse(f"{name} has no option {flag}; `invoke --help {name}` lists those it has")
    Program(namespace=tasks).run(["invoke", "--help", name])


def _needs(**options):
    """Refuse where an option that has no default was not given: with `positional=[]` invoke passes None for
    it.
    """
    _explain(options.values())
    missing = [f"--{name}" for name, value in options.items() if value is None]
    if missing:
        _refuse(f"{' and '.join(missing)} must be given; add --help to see what for")


CLIP = "openai/clip-vit-large-patch14-336"
# Words of `--help` that several tasks share.
OF_IMAGE = {
    "page": "which page, frame or slice of the image file, from 0",
    "window": "black,white of greys of more than 8 bits, e.g. --window=-160,240",
}
OF_CLUSTER = "instead of one machine's processes: tcp://HOST:PORT of a Dask scheduler, or local:N processes"
OF_PLUGIN = {
    "tower": "with --plugin: name or folder of CLIP",
    "quantize": "with --plugin: nf4 or fp4 for a base of four bits",
}
SET = {
    "exp": "name in experiments/, path of a .toml, or a run's folder",
    "set_": "key.path=value in TOML syntax, repeatable",
}


@task(iterable=["set_"], help=SET)
def train(c, exp, set_=None):
    """Train an experiment or continue it, then evaluate it."""
    from medvl.systems import run

    _call(run.run, exp, set_ or ())


@task(
    iterable=["set_"],
    help=SET
    | {
        "variant": "of a language model: base, nf4, int4, merged, or lora (the run itself)",
        "protocol": "of ct_clip, short for --set evaluate.protocol=...: ctrate18, ctrate16, radchest16 or ctclip",
    },
)
def evaluate(c, exp, set_=None, variant="", protocol=""):
    """Evaluate a trained experiment again, or a variant of its model."""
    from medvl.systems import run

    settings = [*(set_ or ()), *([f'evaluate.protocol="{protocol}"'] if protocol else [])]
    _call(run.evaluate, exp, settings, variant=variant)


@task(iterable=["set_"], help=SET | {"sample": "which training conversation, from 0"})
def labels(c, exp, set_=None, sample="0"):
    """Print one training conversation with the trained tokens marked."""
    from medvl.commands import experiments

    _call(experiments.print_labels, exp, set_ or (), _whole("sample", sample))


@task(
    iterable=["set_"],
    help=SET
    | {
        "processes": "number of torchrun processes, with a GPU each; prints what each of them needs",
        "gpu": "for the seconds of a step: h100, h200, a100 or rtx4090",
    },
)
def estimate(c, exp, set_=None, processes="1", gpu="h100"):
    """Print the memory that training an experiment will need, by part, and the seconds of a step."""
    from medvl.commands import experiments

    _call(experiments.print_memory, exp, set_ or (), _whole("processes", processes, 1, 2**20), gpu)


@task(
    iterable=["set_"],
    help=SET
    | {
        "variant": "base, nf4, int4, lora or merged",
        "new_tokens": "of every answer, exactly",
        "batch": "prompts that are also answered together; 0 = none",
    },
)
def bench(c, exp, set_=None, variant="base", new_tokens="64", batch="8"):
    """Measure seconds, memory and bytes of a variant of an experiment's model."""
    from medvl.systems import bench

    tokens = _whole("new-tokens", new_tokens, 1, 2**16)
    size = _whole("batch", batch, 0, 2**16)
    _call(bench.bench, exp, set_ or (), variant, new_tokens=tokens, batch=size)


@task(
    iterable=["set_"],
    help=SET
    | {
        "method": "awq, round or nf4; where the first two cannot, nf4 is taken and the reason kept",
        "variant": "base or merged",
        "samples": "training conversations for awq",
        "group": "values that share a scale: 32, 64, 128, or -1 for a whole row; 0 = 128, or fewer where the rows need it",
    },
)
def quantize(c, exp, set_=None, method="awq", variant="base", samples="128", group="0"):
    """Write an experiment's model in four bits, as a folder that vLLM and transformers open."""
    from medvl.systems import quantize

    number, size = _whole("samples", samples, 1, 2**20), _whole("group", group, -1, 2**20)
    _call(quantize.quantize, exp, set_ or (), method, variant=variant, samples=number, group=size)


@task(
    positional=[],
    help={
        "run": "run folder of ct_clip, or of a system that trains an adapter on a language model",
        "out": "the folder to make",
        "as_": "of a language model: merged (transformers opens it), int4 (merged, in four bits) or peft (peft and vLLM open it)",
        "base": "merged and int4: seen = onto the weights that the adapter was trained on, full = onto the model as it came",
        "quantize": "merged: nf4 or fp4 rounds the merged model to four bits again",
        "group": "int4: values that share a scale, as of quantize",
        "bound": "merged and int4: refuse to lose more than this share of what the adapter learned",
    },
)
def export(c, run, out, as_="merged", base="seen", quantize="none", group="0", bound="0.05"):
    """Write a trained run as a folder for other programs, with a model card; merged models are compared with the run."""
    _needs(run=run, out=out)
    from medvl.systems import export

    size, share = _whole("group", group, -1, 2**20), _number("bound", bound, 0, 1)
    _call(export.export_run, run, out, as_, base=base, quantize=quantize, group=size, bound=share)


@task(
    iterable=["set_"],
    help=SET | {"check": "run nothing: print the gates of a pipeline, exit status 1 where one is red"},
)
def pipeline(c, exp, set_=None, check=False):
    """Bring, measure, quantise, train, score and report a model, in phases that pass gates."""
    # The task has the module's name.
    from medvl.commands import pipeline as commands

    if check:
        sys.exit(_call(commands.check_pipeline, exp, set_ or ()))
    _call(commands.run_pipeline, exp, set_ or ())


@task(
    positional=[],
    iterable=["run", "set_"],
    help={
        "run": "run folder, repeatable: one of tune, document or adapters, one of ct_clip, slide_vqa and unified each",
        "model": "in place of a run of a language model: folder or hub name of a model",
        "registry": "adapters for the model (.toml or .json)",
        "engine": "in place of both: address of a server of OpenAI's API, such as http://vllm:8000",
        "keys": "file of accepted keys (sha256:HEX a line); `--new-key` prints one",
        "host": "default: 127.0.0.1",
        "port": "default: 8000",
        "new_key": "print a new key and its line for the file, and serve nothing",
        "set_": "setting of the service, e.g. rows=8, queue=32, limits.pages=16, repeatable",
    },
)
def serve(c, run=None, model="", registry="", engine="", keys="", host="", port="", new_key=False, set_=None):
    """Serve runs over HTTP: pages become fields with evidence, questions answers. Research use, not for diagnosis."""
    # The task has the module's name.
    from medvl.commands import serve as commands

    if new_key:
        _call(commands.print_key)
        return
    number = _whole("port", port, 0, 65535) if port else -1
    _call(commands.serve, run or (), model, registry, engine, keys, host, number, set_ or ())


@task(
    help={
        "api": "address of the service",
        "key_env": "environment variable with the service's key; default: MEDVL_KEY, where it is set",
        "host": "address at which the page listens; whoever reaches it may ask the service",
        "port": "default: 7860",
    }
)
def ui(c, api="http://127.0.0.1:8000", key_env="MEDVL_KEY", host="127.0.0.1", port="7860"):
    """Serve a page to look at a service (`invoke serve`) in a browser; in an environment of its own, with gradio."""
    from medvl.commands import ui as commands

    _call(commands.serve_page, api, host, _whole("port", port, 1, 65535), key_env)


@task(
    name="gpu-check",
    help={
        "out": "folder for check.json",
        "only": "phases, comma-separated; default: all",
        "budget": "seconds",
    },
)
def gpu_check(c, out="gpu_check", only="", budget="450"):
    """Check medvl on a GPU: is it right, how fast is it; without a GPU a rehearsal of that on the CPU."""
    from medvl.commands import experiments

    sys.exit(_call(experiments.check_gpu, out, only, _whole("budget", budget, 1, 86400)))


@task(help={"out": "also write the versions to this JSON file"})
def doctor(c, out=""):
    """Print what this machine has for medvl, and what each extra lacks; exit status 1 where medvl itself lacks something."""
    from medvl.commands import doctor

    sys.exit(_call(doctor.check_installation, out))


@task
def experiments(c):
    """List the experiments with a line each."""
    from medvl.commands import experiments

    _call(experiments.print_experiments)


@task(
    positional=[],
    help={
        "source": "folder of scans (NIfTI, series of DICOM), one scan, or CSV with a column path or VolumeName",
        "out": "the store to make or to continue, e.g. data/train.h5",
        "exp": "take the CT settings of this experiment instead of the defaults",
        "set_": "setting of CtConfig, e.g. preset=reference, repeatable",
        "metadata": "CSV with RescaleSlope and RescaleIntercept by VolumeName",
        "workers": "processes",
        "sheet": "also write a contact sheet of middle slices to this PNG",
        "exclude": "text file of volumes to leave out, one a line (CT-RATE's no_chest_train.txt)",
        "cluster": OF_CLUSTER,
    },
    iterable=["set_"],
)
def preprocess(c, source, out, exp="", set_=None, metadata="", workers="1", sheet="", exclude="", cluster=""):
    """Bring a folder of CT scans into a store; exit status 3 when scans were rejected."""
    _needs(source=source, out=out)
    from medvl.commands import preprocess as commands

    num_workers = _whole("workers", workers, 1, 1024)
    status = _call(
        commands.fill_store, source, out, exp, set_ or (), metadata, num_workers, sheet, exclude, cluster
    )
    sys.exit(status)


@task(iterable=["set_"], help=SET | {"cluster": OF_CLUSTER})
def features(c, exp, set_=None, cluster=""):
    """Compute the slice features of an experiment with a frozen encoder ahead of its training."""
    from medvl.commands import preprocess as commands

    _call(commands.print_features, exp, set_ or (), cluster)


@task(
    positional=["action"],
    help={
        "action": "build, add, list or show",
        "registry": "the registry's .toml (or .json)",
        "path": "add: an adapter's folder; build: folders, e.g. 'adapters/{task}' or 'output/{task}/v0-*/checkpoint-*'",
        "samples": "JSONL of conversations that it was trained on; build: with {task} in the name, or one "
        "file whose lines name their task",
        "name": "of the adapter",
        "vector": "add: a .npy [d] instead of samples",
        "description": "add: what it is for, in words",
        "category": "add: a group of similar adapters; default: that of the samples",
        "embedder": "build: hub name or folder of a text or image-text encoder; default: fitted on the samples, no download",
        "base": "hub name or folder of the model that all were trained on, if they name it differently or not at all",
        "root": "where the registry's relative paths start; default: the root that it names, or its folder",
        "set_": "build: setting of EmbedConfig, e.g. dims=256, repeatable",
    },
    iterable=["set_"],
)
def adapters(
    c,
    action,
    registry="registry.toml",
    path="",
    samples="",
    name="",
    vector="",
    description="",
    category="",
    embedder="",
    base="",
    root="",
    set_=None,
):
    """A registry of adapters: build it from folders, add to it, list it, show one of it."""
    _needs(action=action)
    from medvl.commands import registries

    _call(
        registries.manage_registry,
        action,
        registry,
        path=path,
        samples=samples,
        name=name,
        vector=vector,
        description=description,
        category=category,
        embedder=embedder,
        base=base,
        root=root,
        overrides=set_ or (),
    )


@task(
    help={
        "question": "in words",
        "adapters": "a registry of adapters (.toml or .json), to be asked about images",
        "run": "run folder of tune, adapters, slide_vqa or unified",
        "plugin": "folder of a plugin to understand images, on its base",
        "slide": "with a slide_vqa run: a file of patch features, STORE.h5::NAME, or a slide of the run by name",
        "image": "with a registry, a plugin or a run of tune, adapters or unified: image file, repeatable",
        "mode": "how adapters are used: bare, selection, mixture (default), fusion or oracle",
        "k": "how many adapters at most; default: the run's, 3 of a registry",
        "own": "the adapter of mode oracle",
        "base": "the model, if the registry does not say it, or it lies elsewhere; of a plugin, too",
        "out": "folder for the map of a slide's answer",
        "max_tokens": "of the answer, at most",
        "offset": "x,y to subtract from the map's shapes: the slide's openslide.bounds-x,bounds-y, if QuPath "
        "crops it (MRXS, SCN)",
        "set_": "settings of adapters, e.g. retrieve.threshold=0.3, fusion.rule=linear, repeatable",
    }
    | OF_IMAGE
    | OF_PLUGIN,
    iterable=["image", "set_"],
)
def ask(
    c,
    question,
    adapters="",
    run="",
    slide="",
    image=None,
    mode="",
    k="",
    own="",
    base="",
    out="maps",
    max_tokens="256",
    offset="",
    set_=None,
    plugin="",
    tower=CLIP,
    quantize="none",
    page="",
    window="",
):
    """Ask adapters that fit a question, a run or a plugin, about images or a slide. Research use, not for diagnosis."""
    from medvl.commands import questions

    # Not 0 where -k is left out: the run says how many, and 0 can be asked for.
    num_adapters = -1
    if k:
        num_adapters = _whole("k", k)
    _call(
        questions.print_answer,
        question,
        adapters=adapters,
        run=run,
        slide=slide,
        images=image or (),
        mode=mode,
        k=num_adapters,
        own=own,
        base=base,
        out=out,
        max_tokens=_whole("max-tokens", max_tokens, 1, 2**20),
        offset=offset,
        overrides=set_ or (),
        plugin=plugin,
        tower=tower,
        quantize=quantize,
        page=_whole("page", page) if page else None,
        window=window,
    )


@task(
    positional=[],
    help={
        "question": "in words, such as 'Reconstruct the image.'",
        "out": "the PNG to write; with --questions a folder",
        "image": "image file; without one the picture comes from the text alone",
        "run": "run folder of unified",
        "plugin": "folder of a plugin to draw, on its base",
        "base": "the plugin's base, if it lies elsewhere",
        "vq": "with --plugin: folder of the VQ model, from `invoke vqgan convert`",
        "questions": "JSON lines of text and image, in place of --question and --image",
        "batch": "pictures drawn at a time",
        "temperature": "codes are drawn by chance at it; 0 = the likeliest each time",
        "seed": "of chance",
    }
    | OF_IMAGE
    | OF_PLUGIN,
)
def draw(
    c,
    out,
    question="",
    image=None,
    run="",
    plugin="",
    base="",
    vq="",
    tower=CLIP,
    quantize="none",
    questions="",
    batch="8",
    temperature="0",
    seed="0",
    page="",
    window="",
):
    """Draw the picture that a text asks for, from an image or without one. Research use, not for diagnosis."""
    _needs(out=out)
    from medvl.commands import pictures

    _call(
        pictures.draw_pictures,
        question,
        out,
        image=image,
        run_path=run,
        plugin=plugin,
        base=base,
        vq=vq,
        tower=tower,
        quantize=quantize,
        questions=questions,
        batch=_whole("batch", batch, 1, 2**20),
        temperature=_number("temperature", temperature, 0, 100),
        seed=_whole("seed", seed),
        page=_whole("page", page) if page else None,
        window=window,
    )


@task(iterable=["set_"], help=SET | {"exp": "name in experiments/, or path of a .toml"})
def data(c, exp, set_=None):
    """Fetch public data sets of medical images and notes, and write their conversations."""
    # The task has the module's name.
    from medvl.commands import data as commands

    _call(commands.fetch, exp, set_ or ())


@task(
    positional=["action"],
    help={
        "action": "convert",
        "source": "file of conversations in any shape",
        "out": "file to write: JSON lines, or an array where it ends in .json",
        "shape": "llava, swift, trl, completion or openai",
        "root": "where relative names of the source's images start; default: its folder",
    },
)
def conversations(c, action, source, out, shape, root=""):
    """Convert a file of conversations to the shape that another program reads; nothing is lost."""
    _needs(action=action, source=source, out=out, shape=shape)
    from medvl.commands import data as commands

    _call(commands.convert, action, source, out, shape, root)


@task(
    positional=["action"],
    help={
        "action": "check or pack",
        "features": "folder of patch features, or a packed store",
        "data": "check: file of captions or questions (any supported format), repeatable; without it all "
        "features are checked",
        "out": "pack: the store to make or to continue",
        "dims": "width that the features must have",
        "encoder": "encoder that the features must be of",
        "drop": "pack: leave out patches that are not finite, and count them",
    },
    iterable=["data"],
)
def slides(c, action, features, data=None, out="", dims="0", encoder="", drop=False):
    """Audit patch features against questions, or pack them into one store; exit status 3 when one is wrong."""
    _needs(action=action, features=features)
    # The task has the module's name.
    from medvl.commands import slides as commands

    width = _whole("dims", dims, 0, 2**17)
    status = _call(commands.check_or_pack, action, features, data or (), out, width, encoder, drop)
    sys.exit(status)


@task(
    positional=["action"],
    help={
        "action": "convert",
        "config": "model.yaml of taming-transformers",
        "ckpt": "last.ckpt beside it, or its weights as .safetensors",
        "out": "folder to make: model.safetensors and vq.json",
    },
)
def vqgan(c, action, config, ckpt, out):
    """Convert a published VQ model (images as codes) to safetensors; nothing in its checkpoint is run."""
    _needs(action=action, config=config, ckpt=ckpt, out=out)
    # The task has the module's name.
    from medvl.commands import vqgan as commands

    _call(commands.convert, action, config, ckpt, out)


@task(
    positional=["source"],
    help={
        "source": "a page (PNG, JPEG, TIFF, WebP), a PDF or a DICOM file",
        "out": "PNG or DICOM file to write; of a PDF or several pages a folder of PNGs to make",
        "known": "text file of names and numbers that are sought as well, one a line",
    },
)
def redact(c, source, out, known=""):
    """Black out names, dates and numbers of a page and clean a DICOM header; status 3 if a second reading finds more."""
    _needs(source=source, out=out)
    # The task has the module's name.
    from medvl.commands import redact as commands

    sys.exit(_call(commands.redact, source, out, known))


@task(
    positional=["action"],
    help={
        "action": "convert",
        "weights": "com_hlora_weights.bin, gen_hlora_weights.bin or another file of H-LoRA weights",
        "fusion": "fusion_layer_weights.bin: token table and head, needed to draw",
        "variant": "M3, L14 or XL32",
        "task": "understand or draw",
        "base": "name or folder of the base model; default: the variant's name on the hub",
        "out": "folder to make: plugin.safetensors and plugin.json",
    },
)
def plugin(c, action, weights, variant, task, out, fusion="", base=""):
    """Convert a published plugin of HealthGPT to safetensors, after a check of every key; nothing in it is run."""
    _needs(action=action, weights=weights, variant=variant, task=task, out=out)
    from medvl.commands import plugins

    _call(plugins.convert, action, weights, fusion, variant, task, base, out)


# Options of the tasks about one scan.
SCAN = {
    "run": "run folder",
    "scan": "NIfTI file, DICOM folder or ZIP",
    "metadata": "CSV with the scan's row by VolumeName, if its header is incomplete",
    "set_": "how this scan is read: hu=none, hu=metadata, spacing_from=metadata, tilt=shear, repeatable",
    "series": "UID of the series that is meant, where a folder or ZIP of DICOM holds several",
}


@task(
    positional=[],
    help=SCAN
    | {
        "scan": "NIfTI file or ZIP; or a folder of scans, or a CSV with a column path",
        "out": "write the embedding [d] to this .npy; of several scans [n, d], and their names to a .csv beside it",
    },
    iterable=["set_"],
)
def embed(c, run, scan, out, metadata="", set_=None, series=""):
    """Embed one scan or many with a trained run; status 3 if some of many were rejected."""
    _needs(run=run, scan=scan, out=out)
    from medvl.commands import scans

    scan = f"{scan}/{series}" if series else scan
    sys.exit(_call(scans.embed_scan, run, scan, out, metadata, set_ or ()))


@task(
    positional=[],
    help=SCAN
    | {
        "finding": "any finding in words, repeatable; default: those of the run",
        "out": "folder to make: a page with the slices that speak for each finding, and tables",
    },
    iterable=["finding", "set_"],
)
def classify(c, run, scan, finding=None, metadata="", set_=None, out="", series=""):
    """Zero-shot findings of one scan with a trained run. Research use, not for diagnosis."""
    _needs(run=run, scan=scan)
    from medvl.commands import scans

    scan = f"{scan}/{series}" if series else scan
    _call(scans.print_findings, run, scan, finding or (), metadata, set_ or (), out)


@task(
    positional=[],
    help={
        "source": "folder, CSV or file of CT scans, as of `preprocess`",
        "out": "folder for audit.csv and report.html",
        "metadata": "CSV of metadata by VolumeName",
        "reports": "CSV of reports by VolumeName",
        "labels": "CSV of labels by VolumeName",
        "no_chest": "text file of volumes that show no chest, one a line",
        "workers": "processes",
    },
)
def audit(c, source, out, metadata="", reports="", labels="", no_chest="", workers="1"):
    """Read the headers of CT scans: what they are, what `preprocess` would refuse and why, and its settings."""
    _needs(source=source, out=out)
    from medvl.commands import audit as commands

    num_workers = _whole("workers", workers, 1, 1024)
    _call(commands.audit_tree, source, out, metadata, reports, labels, no_chest, num_workers)


@task(
    positional=[],
    help={
        "labels": "CSV of labels by VolumeName",
        "out": "folder for {part}_*.csv",
        "rule": "balanced keeps the prevalence of every finding; reference is the rule of "
        "peterhan91/clip_3d_ct, with its file names and split_summary.json, to compare with its numbers",
        "sizes": "balanced: part=size,...: volumes or shares; default: valid=550,test=2489",
        "seed": "balanced: of the draw; default: 0",
        "target": "reference: validation has at most 50 volumes more; default: 500",
        "table": "another CSV to split the same way (reports, metadata), repeatable",
        "patient": "the column of a table that names the patient; default: patients are read from CT-RATE's "
        "names",
        "pattern": "a regular expression that finds the patient in a volume's name, e.g. '(P[0-9]+)_'",
    },
    iterable=["table"],
)
def split(
    c,
    labels,
    out,
    rule="balanced",
    sizes="",
    seed="",
    target="",
    table=None,
    patient="",
    pattern="",
):
    """Split a label table by patient; the prevalence of every finding is kept."""
    _needs(labels=labels, out=out)
    from medvl.commands import split as commands

    # An option of the other rule would change nothing, so it is a mistake.
    foreign = {"balanced": {"target": target}, "reference": {"sizes": sizes, "seed": seed}}
    if rule not in foreign:
        _refuse(f"--rule must be balanced or reference, got {rule!r}")
    for name, value in foreign[rule].items():
        if value:
            _refuse(f"--{name} does not belong to --rule {rule}; leave it out")
    reference_target = _whole("target", target or "500", 1) if rule == "reference" else 0
    seed_number = _whole("seed", seed or "0", 0, 2**32 - 1)  # what numpy's generators take
    sizes = sizes or "valid=550,test=2489"
    _call(
        commands.split_tables,
        labels,
        out,
        sizes,
        seed_number,
        table or (),
        patient,
        pattern,
        reference_target,
    )


@task(
    positional=[],
    help={
        "table": "CSV of reports: VolumeName, Findings_EN, Impressions_EN; it is not changed",
        "examples": "CSV of the training split's reports, of other patients",
        "out": "CSV to write, with a column Impression_source; a log (.json) and the answers lie beside it",
        "engine": "address of a server of OpenAI's API, such as http://vllm:8000",
        "model": "as that server calls it; without --engine a folder or hub name of a model that runs here",
        "for_training": "complete reports although labels made from them are evaluated (valid_, test_)",
        "shots": "examples in a prompt",
        "seed": "of the draw of examples and of the answers",
        "max_tokens": "of an answer",
        "in_flight": "requests at a time",
    },
)
def impressions(
    c,
    table,
    examples,
    out,
    engine="",
    model="",
    for_training=False,
    shots="8",
    seed="0",
    max_tokens="256",
    in_flight="16",
):
    """Write the impressions that reports lack from their findings, by a language model. Research use, not for diagnosis."""
    _needs(table=table, examples=examples, out=out)
    # The task has the module's name.
    from medvl.commands import impressions as commands

    _call(
        commands.fill_impressions,
        table,
        examples,
        out,
        engine=engine,
        model=model,
        shots=_whole("shots", shots, 1, 1000),
        seed=_whole("seed", seed),
        max_tokens=_whole("max-tokens", max_tokens, 1, 2**20),
        in_flight=_whole("in-flight", in_flight, 1, 1024),
        for_training=for_training,
    )
