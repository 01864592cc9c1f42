"""A run from its first step, or its newest checkpoint, to its summary."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

import kernels
from engine.core import dist
from engine.core.durable import storage_fault
from engine.core.errors import BadInput
from engine.core.extras import Extras
from engine.core.gpus import of_full_memory, peak_flops
from engine.core.owner import owned
from engine.core.phases import Phase
from engine.core.stopping import Interrupted, StopRequest
from engine.data.identity import Identity
from engine.training import checkpoint, folder, graphs, pictures, probe, saving
from engine.training.build import as_evaluated, build
from engine.training.choosing import choose
from engine.training.feeding import Feeding
from engine.training.log import RunLog
from engine.training.loop import Cadence, Stopped, run_stage
from engine.training.metrics import read_metrics
from engine.training.operations import operations
from engine.training.parts import Parts
from engine.training.precision import described
from engine.training.profiling import Profile
from engine.training.state import TrainState, content, restore
from engine.training.token_choice import Measured, in_words
from engine.training.waits import verdict

# What judges a finished run: of its parts, its folder and what may be left out, the figures by name, by weights.
Evaluate = Callable[[Parts, Path, Extras], dict[str, dict[str, float]]]


def run(parts: Parts, evaluate: Evaluate) -> int:
    """Train all stages, evaluate, leave the run folder. A stop request ends it early with a saved state.

    Returns:
        The exit status: 0, or 1 where the training is whole and something that came after it is missing, which was told.

    Raises:
        Interrupted: a signal came where it could not wait, or a second one; what stands then was told.
        BadInput: the folder cannot be written (any more); with what is safe, and how to go on.
    """
    out = Path(dist.share(str(folder.of_run(parts.plan, parts.ranks.first))))
    ranks, track = parts.ranks, parts.plan.train.track
    log = RunLog(out if ranks.first else None, rank=ranks.rank, peak_flops=_peak_flops(ranks), track=track)
    with owned(out, log.message) if ranks.first else nullcontext():
        try:
            return _run(parts, out, log, evaluate)
        except (OSError, SafetensorError) as error:
            if fault := storage_fault(error, out):
                raise BadInput(f"{out} cannot be written any more ({fault}). {_how_to_go_on(out)}") from error
            log.note("failed", f"{type(error).__name__}: {error}", shown=False)
            raise
        except torch.OutOfMemoryError as error:
            log.note("failed", f"{type(error).__name__}: {error}", shown=False)
            again = (
                f" --resume {out} goes on from the last checkpoint." if checkpoint.found(out / "checkpoints") else ""
            )
            raise BadInput(f"{of_full_memory(error)}.{again}") from error
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            if gone := dist.of_lost_rank(error):
                told = (
                    f"another process of this run is gone or does not answer ({gone}): see what it said, and go on with all of "
                    f"them by --resume {out}, or start anew where nothing was saved."
                )
            log.note("failed", str(error) if isinstance(error, BadInput) else told, shown=False)
            if gone:
                raise BadInput(told) from error
            raise


def _run(parts: Parts, out: Path, log: RunLog, evaluate: Evaluate) -> int:
    """In a folder that is this run's."""
    train, ranks = parts.plan.train, parts.ranks
    profile = Profile(train.profile if ranks.first else 0, out, ranks.device, log)
    if ranks.first and not train.resume:
        folder.begin(out, parts.plan)
    _introduce(parts, out, log)
    choose(parts, out, log.message)
    log.message("kernels: " + "; ".join(" ".join(line.split()) for line in kernels.describe(ranks.device).splitlines()))
    if ranks.device.type == "cuda":
        log.message(graphs.described(parts.ungraphed()))
    state = _resumed(parts, out, log) if train.resume else None
    extras, speeds = Extras(log.message), []
    with log, StopRequest() as stop:
        try:
            for index in range(state.stage if state else 0, len(parts.stages)):
                state = _at_stage(parts, index, state, out)
                speeds += _train(parts, state, out, log, stop, profile)
                _finish(parts, state, out, extras)
        except Stopped:
            log.note("stopped", f"stopped and saved; go on with: python -m engine.train --resume {out}")
            return 0
        except Interrupted:
            log.note("interrupted", _what_stands(out))
            raise
        log.close()
        log.note("trained", "all steps are trained", shown=False)
        if ranks.first:
            summary = _summary(parts, state, out, extras) | {"speed": speeds}
            log.close(summary)  # what was trained stands, whatever becomes of what follows
            try:
                log.close(summary | _judged(parts, out, evaluate, extras))
            except Interrupted:
                log.note(
                    "interrupted", f"stopped; the training is whole, judge it by: python -m engine.eval --weights {out}"
                )
                raise
        dist.barrier()
    return 1 if extras.left_out else 0


def _how_to_go_on(out: Path) -> str:
    """After a disk has failed."""
    again = f"mend that, and go on with: python -m engine.train --resume {out}"
    try:
        safe = checkpoint.newest_sound(out / "checkpoints")
    except OSError:
        return f"What is safe cannot be read now; {again}"
    return f"Checkpoint {safe.name} is whole; {again}" if safe else "Nothing was saved yet; make room, and start again."


def _what_stands(out: Path) -> str:
    """After a signal that could not wait for the next step."""
    if checkpoint.found(out / "checkpoints"):
        return f"stopped at once; what came after the last checkpoint is lost, go on with: python -m engine.train --resume {out}"
    return f"stopped at once, before anything was saved; {out} can be removed"


def _resumed(parts: Parts, out: Path, log: RunLog) -> TrainState:
    """The state in the newest sound checkpoint."""
    tensors, where = checkpoint.newest(out / "checkpoints", partial(log.note, "checkpoint damaged"))
    _check_images(parts, where, log)
    state = build(parts, where["stage"], None, anew=False)
    restore(state, tensors, where)
    step = parts.stages[state.stage].first_step + state.step
    log.resume(step)
    log.note("resumed", f"going on from step {step:,}")
    return state


def _check_images(parts: Parts, where: dict, log: RunLog) -> None:
    """Go on with the images that the checkpoint saw, or knowingly with others."""
    if "images" not in where:
        log.note(
            "images unknown",
            "this checkpoint is of a version that did not note which images it saw: they are taken as they are.",
        )
        return
    changed = parts.identity.difference(Identity.from_json(where["images"]))
    if changed and not parts.plan.train.changed_data:
        raise BadInput(
            f"--resume finds other images in {parts.train_images.root} than this run had: {changed}. Bring them back, name where "
            "they are by --data, or go on with these by --changed-data."
        )
    if changed:
        log.note("other images", f"going on with other images, as --changed-data says: {changed}.")


def _at_stage(parts: Parts, index: int, state: TrainState | None, out: Path) -> TrainState:
    """The state, if it is in this stage; else the stage at its first step, after that state's."""
    if state is not None and state.stage == index:
        return state
    bad_files, chosen = (state.bad_files, state.chosen) if state else ([], {})
    state = build(parts, index, state.method if state else None)
    state.bad_files, state.chosen = bad_files, chosen
    if parts.ranks.first:
        state.method.keepsakes(out)
    return state


def _peak_flops(ranks: dist.Ranks) -> float | None:
    """Of all devices of the run together; None where it is not known."""
    peak = peak_flops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
    return peak and peak * ranks.world


def _introduce(parts: Parts, out: Path, log: RunLog) -> None:
    plan, ranks = parts.plan, parts.ranks
    device = (
        torch.cuda.get_device_name(ranks.device)
        if ranks.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    log.message(f"{plan.train.method} ({plan.source}) with {plan.model} on {len(parts.train_images):,} images")
    how = [described(parts.precision, parts.ranks.device), "compiled" if parts.compiles else "not compiled"]
    how += plan.train.in_words()
    log.note("begun", f"{ranks.world} x {device}, {', '.join(how)}; run folder {out}")
    if parts.loaded:
        log.message(parts.loaded)
    bad = parts.train_images.bad
    if bad:
        log.message(f"{len(bad)} unreadable images are replaced; they are listed in {out / folder.BAD_FILES}")


def _train(
    parts: Parts, state: TrainState, out: Path, log: RunLog, stop: StopRequest, profile: Profile
) -> list[dict[str, float | str]]:
    """The stage from the state's step to its end. Returns how fast it went, for the summary; nothing if it had ended before."""
    train, stage = parts.plan.train, parts.stages[state.stage]
    if state.step == stage.total_steps:
        if parts.ranks.first:
            saving.complete(parts, state, out, log)
        return []
    began = time.monotonic()
    feeding = Feeding(parts, state, partial(_tell_phase, parts, state, log), partial(_tell_choice, log), log.aside)
    if not state.method.views():
        seconds = time.monotonic() - began
        log.log(stage.first_step + state.step, {"storing_features_seconds": seconds}, kind="event")
    try:
        with (
            stop.deferred(),
            profile.stage(stage.name, stage.first_step + state.step, stage.total_steps - state.step) as watch,
            saving.Saving(parts, state, out, log) as saves,
        ):
            if state.method.draws_ahead:
                log.message(f"{stage.name}: what a step draws is drawn one step ahead, in a thread of its own")
            run_stage(
                state, stage, feeding, feeding.drawn, log,
                Cadence(train.log_every, train.probe_every, train.save_every, train.abort_after, train.rewind), stop,
                watch=watch, probe=_probe(parts, state, out), saving=saves,
                turn=feeding.turn, go_back=partial(_go_back, state, out, log),
                over_limit=lambda: feeding.over_limit, labels=parts.images(stage.index).labels,
            )  # fmt: skip
    finally:
        feeding.close()
    speed: dict[str, float | str] = {"stage": stage.name, **log.speed()}
    if slow := verdict(speed.get("waiting_for_data", 0.0), parts.feed(state)):
        speed["verdict"] = slow
        log.message(f"{stage.name}: {slow}; --dry-run measures it")
    return [speed]


def _tell_phase(parts: Parts, state: TrainState, log: RunLog, phase: Phase) -> None:
    batch = state.update.images_per_step
    log.cost(batch, state.update.flops_per_image())
    sides = " and ".join(str(side) for side in sorted({view.size[0] for view in state.method.views()}, reverse=True))
    patches = sorted({form.patch_size(parts.encoder.patch_size) for form in phase.forms})
    words = f"crops of {sides} pixels from here on" + f", {phase.keep:.0%} of a large one's patches" * (phase.keep < 1)
    if len(phase.sides) > 1:
        words += f", each image's within {', '.join(f'{side:.3g}' for side in phase.sides)} of these"
    if phase.small < 1:
        words += f", {state.method.phase.small_crops(parts.settings(state.stage).local_crops)} small ones"
    words += f", in patches of {' or '.join(map(str, patches))} pixels" + ", drawn for each step" * (len(patches) > 1)
    words += f", stochastic depth of {phase.depth:g} times the model's rates" * (phase.depth != 1)
    words += f", {batch:,} images a step" * (parts.settings(state.stage).phase_batch != "same")
    log.note("phase", words + "; they are compiled for now" * parts.compiles)


def _tell_choice(log: RunLog, phase: Phase, table: Sequence[Measured]) -> None:
    rows = [f"{in_words(one.phase)} {one.error:.3g} ({one.cost:.2f} of the compute)" for one in table]
    words = f"the next stretch sees {in_words(phase)}: errors of gradients are {', '.join(rows)}"
    fields = ("bias", "variance", "cost", "error")
    entries = [asdict(one.phase) | {name: getattr(one, name) for name in fields} for one in table]
    log.note("tokens", words, chosen=asdict(phase), measured=entries)


def _go_back(state: TrainState, out: Path, log: RunLog, until: int, why: str) -> None:
    """Give the state the weights of the newest sound checkpoint of at most `until` updates; it stays at its step, so the batches
    since are left out.

    Raises:
        BadInput: there is no such checkpoint of this stage.
    """
    step, bad_files, rewound, chosen = state.step, list(state.bad_files), state.spikes.rewound, state.chosen
    try:
        tensors, where = checkpoint.newest(out / "checkpoints", partial(log.note, "checkpoint damaged"), until)
    except BadInput as error:
        raise BadInput(f"{why}, and --rewind finds {error}") from error
    if where["stage"] != state.stage:
        raise BadInput(
            f"{why}, and --rewind finds no checkpoint of this stage from before that; set --save-every lower."
        )
    restore(state, tensors, where)
    log.note(
        "went back",
        f"{why}: back to the weights of {step - state.step:,} updates ago, and on with the batches to come",
    )
    state.step, state.bad_files[:], state.spikes.rewound, state.chosen = step, bad_files, rewound + 1, chosen


def _probe(parts: Parts, state: TrainState, out: Path) -> Callable[[], dict[str, float | str]]:
    """What measures the encoder, with a verdict in words on the first rank."""
    ranks = parts.ranks
    online = probe.OnlineProbe(
        parts.train_images, parts.val_images, parts.encoder.img_size, device=ranks.device, batch_size=256,
        rank=ranks.rank, world=ranks.world, gather=dist.all_gather,
        # a classifier's own accuracy is a result, not a sign of health: it is taken over the whole split
        **({} if state.method.classifier is None or parts.val_images is None else {"max_val": len(parts.val_images)}),
    )  # fmt: skip

    def measure() -> dict[str, float | str]:
        with as_evaluated(parts, state):
            method = state.method
            choose = method.choose if method.prototype_count else None
            values = online.measure(method.features, choose, method.prototype_count, method.classifier)
        if not ranks.first:
            return values
        stage, prototypes = parts.stages[state.stage], state.method.prototype_count
        records = read_metrics(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
        last = next((r for r in reversed(records) if r["kind"] == "train" and r["stage"] == stage.name), {})
        values |= probe.loss_over_ln_k(last, prototypes)
        step = stage.first_step + state.step
        values |= probe.skipped_since(records, stage.name, stage.first_step, step, int(state.update.skipped))
        now = probe.Health.of(step, values | {"prototypes": prototypes})
        return values | {"verdict": probe.verdict([*probe.history(records), now])}

    return measure


def _finish(parts: Parts, state: TrainState, out: Path, extras: Extras) -> None:
    """Keep the stage's encoder and draw what it learned."""
    if parts.ranks.first:
        folder.export(parts, state.method, content(state), folder.of_stage(out, parts.stages[state.stage]))
        if state.method.trains_encoder:
            with extras.of(f"pictures of stage {parts.stages[state.stage].name}"):
                pictures.draw(parts, state, out / "pictures")
    dist.barrier()


def _summary(parts: Parts, state: TrainState, out: Path, extras: Extras) -> dict:
    """What summary.json holds of the training."""
    probes: list[dict] = []
    with extras.of("probes in summary.json"):
        probes = [record for record in read_metrics(out / "metrics.jsonl") if record["kind"] == "probe"]
    return {
        "method": parts.plan.train.method,
        "model": parts.plan.model,
        "source": parts.plan.source,
        "steps": parts.stages[-1].first_step + parts.stages[-1].total_steps,
        "skipped_updates_of_last_stage": int(state.update.skipped),
        "unreadable_images": len(parts.train_images.bad) + len(state.bad_files),
        "events": folder.events(out),
        "export": str(out / "export"),
        "probes": probes,
        "operations": operations(parts.plan, parts.stages, len(parts.train_images.classes or ()), state.chosen),
        "seconds_of_this_process": round(time.monotonic() - parts.started, 1),
    }


def _judged(parts: Parts, out: Path, evaluate: Evaluate, extras: Extras) -> dict:
    """What summary.json holds besides: how the stages were judged, and what could not be had."""
    found: dict = {}
    with extras.of("pictures/curves.png"):
        from engine.training import curves  # brings matplotlib

        curves.draw(out / "pictures" / "curves.png", out / "metrics.jsonl")
    if parts.plan.train.evaluate:
        with extras.of("evaluation"):
            found["evaluation"] = evaluate(parts, out, extras)
    if extras.left_out:
        found["left_out"] = extras.left_out
        extras.say(
            f"the training is whole, and {len(extras.left_out)} of what comes after it is missing; judge it again by python -m "
            f"engine.eval --weights {out}"
        )
    return found | {"seconds_of_this_process": round(time.monotonic() - parts.started, 1)}
