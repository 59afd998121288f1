"""Several learning rates at once, train.py --lr 0.03 0.1 0.3: each trains for a tenth of the steps, from the same start on
the same batches, and the best on validation goes on, exactly as a run with that rate alone.

    <run>/lr-0.1/    a run of its own that stops after its tenth; the best one's files become the run's

Where a tenth is too short to tell, a trial is longer: twice the warm-up, in which all rates begin alike, and LEAST steps.
"""

import math
import shutil

from minigpt.files import UserError
from prefix import distributed
from prefix.distributed import log
from prefix.trainer import NotFinite

LEAST = 20  # steps of a trial: on the demo 0.1 is ahead of 0.3 from step 4 to 16, and behind from 18 to the end


def try_rates(rates, make_trainer, out):
    """-> the Trainer of the best rate, which stands where its trial ended, in the run directory `out`. If a signal ended
    a trial early, its Trainer, which is `stopped`; called again, it goes on where it was. make_trainer(rate, directory)
    -> a Trainer at its start, with validation pairs."""
    losses = {}
    for rate in rates:
        trial = make_trainer(rate, out / f"lr-{rate}")
        end = trial_steps(trial.settings)
        if distributed.rank() == 0:
            trial.out.mkdir(exist_ok=True)
        trial.resume()
        if trial.progress.step > end:
            raise UserError(f"{trial.out}: {trial.progress.step} steps were tried already: --steps cannot be fewer now")
        try:
            trial.run(end)
        except NotFinite as error:
            log(f"--lr {rate}: {error}")
            continue
        if trial.stopped or any(distributed.all_gather([bool(trial.stop)])):  # also in its last save
            trial.stopped = True
            return trial
        loss = trial.validation_loss()
        losses[rate] = loss if math.isfinite(loss) else math.inf
        log(f"--lr {rate}: validation loss {loss:.4f} after {end:,} of {trial.settings.steps:,} steps")
    if not losses:
        raise NotFinite("none of these --lr gives finite numbers: try lower ones")
    best = min(losses, key=losses.get)
    log(f"Going on with --lr {best}")
    trainer = make_trainer(best, out)
    if distributed.rank() == 0:  # if it is killed here, the next call does it again
        try:
            shutil.copytree(out / f"lr-{best}", out, dirs_exist_ok=True)
        except shutil.Error as error:
            raise UserError(f"{out}: cannot be written: {error.args[0][0][2]}") from error
    trainer.resume()
    trainer.save()  # on the disk, which a copy need not be yet
    return trainer


def trial_steps(settings):
    return min(settings.steps, max(settings.steps // 10, 2 * settings.warmup, LEAST))
