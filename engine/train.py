"""`python -m engine.train`: flags -> plan -> parts -> run. `engine.training.folder` says what a run leaves."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.core import dist
from engine.core.errors import BadInput
from engine.core.extras import Extras
from engine.core.stopping import Interrupted
from engine.training import config
from engine.training.dry_run import dry_run
from engine.training.parts import Parts, prepare
from engine.training.run import run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 when the run ended or was saved on request, 2 for input that cannot be used, 128 +
    the number of a signal that ended it at once."""
    try:
        plan = config.parse(sys.argv[1:] if arguments is None else arguments)
        ranks = dist.start(plan.train.device)
        try:
            parts = prepare(plan, ranks)
            return dry_run(parts) if plan.train.dry_run else run(parts, evaluate)
        except BadInput as error:
            # any rank may be the only one to see it
            if dist.first_to_say(str(error)):
                print(f"error{'' if ranks.first else f' (rank {ranks.rank})'}: {error}", file=sys.stderr, flush=True)
            return 2
        except Exception as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                error.add_note(
                    "Compiling failed, which is worth an issue with the lines above; --compile off goes without."
                )
            raise
        finally:
            dist.stop()
    except BadInput as error:  # of the flags, the same on every rank
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:  # what stands was told
        return stopped.status
    except KeyboardInterrupt:
        print("stopped before the run began; nothing was written", file=sys.stderr)
        return 130


def evaluate(parts: Parts, folder: Path, extras: Extras) -> dict[str, dict[str, float]]:
    """Judge what the run learned; by weights, the figures by name."""
    from engine.evals import of_run  # brings scikit-learn, which takes seconds: only a run that ends needs it

    return of_run.evaluate(parts, folder, extras)


if __name__ == "__main__":
    sys.exit(main())
