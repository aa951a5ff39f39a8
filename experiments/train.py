"""Train a language model.

    python -m experiments.train --config=configs/gla_r6.py:tiny                              # minutes on two CPU cores
    python -m experiments.train --config=configs/gla_r6.py --config.data.source=STORE        # 340M, on a token store
    python -m experiments.train --config=configs/gla_r6.py:tiny --config.train.steps=1000 --workdir=runs/longer

Run the same command again to continue a run that was stopped or killed. SIGTERM or Ctrl-C saves and stops between two
steps; a second one stops at once. Exit code 0: done; 1: the run cannot go on; 2: a mistake in what was asked for; 130:
stopped by Ctrl-C; 143: by SIGTERM, as another of its processes was lost, or, of several processes, by either signal to one
of them. Of a GPU's memory it takes 95 %, unless XLA_CLIENT_MEM_FRACTION says otherwise.

This file is the order in which things happen; what they are is in hybrid_jax/train.
"""

import os
import time
from contextlib import closing

from experiments import cli, folder, processes
from experiments.revision import revision
from hybrid_jax.chips import GPU_SHARE

STOPPING = "saving and stopping after this step; a second signal stops at once, and loses what no checkpoint has"


def main(run: cli.Run) -> int:
    if not os.environ.keys() & {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"}:  # two names of one thing
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(GPU_SHARE)

    import jax  # this, and all that needs it, once the command line is known to be right

    from hybrid_jax.amounts import gigabytes
    from hybrid_jax.data.sources import mixed_sources
    from hybrid_jax.evals.evaluate import make_evaluate
    from hybrid_jax.hf.convert import carried_tokenizer
    from hybrid_jax.sharding import make_mesh
    from hybrid_jax.train import advice, summary
    from hybrid_jax.train.checkpoints import Checkpoints
    from hybrid_jax.train.feed import Feed, batch_shapes
    from hybrid_jax.train.optimizer import evaluation_params
    from hybrid_jax.train.report import Report
    from hybrid_jax.train.signals import Stop
    from hybrid_jax.train.step import TrainState, compile_step, make_program, state_bytes
    from hybrid_jax.train.trace import Trace
    from hybrid_jax.train.workdir import check_room, claim, evaluation_file, finished, keep_programs

    config, workdir, steps = run.config, folder.of(run.name), run.config.train.steps

    def every(n: int | None, step: int) -> bool:
        return step == steps or (n is not None and step > 0 and step % n == 0)

    code = revision()  # now: by the end of the run another may be checked out
    processes.connect(stops_together=True)
    keep_programs(workdir)

    # ---- Can it be done? Nothing is allocated yet.
    advice.check_platform(config.platform)
    advice.check_logging(config.log)
    mesh = make_mesh(config.mesh)
    program = make_program(config, mesh)
    carried = carried_tokenizer(workdir)
    text, held_out = mixed_sources(config.data.sources, carried)
    text.check_vocabulary(config.model.vocabulary)
    evaluate = make_evaluate(config, program.graph, mesh, held_out)
    Feed(config, text, mesh).close()
    claim(workdir, config, text)
    if finished(workdir, steps):
        return summary.show_again(workdir, config)
    check_room(workdir, config, state_bytes(program.state))

    with jax.set_mesh(mesh), Checkpoints(workdir, config.checkpoint, for_good=config.open_steps) as checkpoints, Stop(STOPPING) as stop:
        # ---- The state: the newest checkpoint, parameters that were given, or fresh ones.
        state, warnings = checkpoints.restore(program.state)
        if state is None:
            state = program.init(jax.random.key(config.train.seed))
        elif not isinstance(state, TrainState):
            state = program.begin(state)
        first = step = int(state.step)

        report = Report(config, workdir, run.name, first, int(state.skipped))
        trace = Trace(workdir, config.log.profile_steps, report.say)
        with closing(report), closing(Feed(config, text, mesh, first)) as batches, trace:
            report.say(f"{run.name}: step {first} of {steps}, on {mesh.size} x {jax.devices()[0].device_kind}, in {workdir}")
            for note in (*warnings, *advice.notes(config, text, report.peak, carried)):
                report.say(f"note: {note}")

            def measure() -> bool:
                """Whether the step is evaluated now: who asks for a stop is not kept waiting."""
                results = evaluate(evaluation_params(config.optimizer, state.params, state.opt_state), stop.asked)
                if results:
                    report.evaluation(step, results)
                return results is not None

            def save() -> None:
                report.flush()  # a run that goes on from here is to have all rows until here
                checkpoints.save(state)

            # What a kill between the checkpoint and its evaluation left out.
            evaluated = every(config.evaluation.every, first) and (evaluation_file(workdir, first).exists() or measure())

            # ---- Compile, once.
            if first < steps:
                started = time.perf_counter()
                report.display.doing("compiling")
                train_step, held = compile_step(program, batch_shapes(config, mesh))
                report.say(f"compiled in {time.perf_counter() - started:.0f} s; a step holds {gigabytes(held)} on each device")
                report.display.doing("first step")
                report.say(advice.implementations(config.model, advice.implementations_of(config.model, train_step.as_text())))

            # ---- Train. A step is reported when the next one is under way, so that the devices never wait for the host.
            report.start_clock()
            unreported = []
            for step in range(first + 1, steps + 1):
                state, metrics = trace.step(step, train_step, state, batches)
                stopping = stop.asked()
                saving = stopping or every(config.checkpoint.every, step) or step == config.open_steps
                evaluating = every(config.evaluation.every, step)
                unreported.append((step, metrics))
                while len(unreported) > (0 if saving or evaluating else 1):
                    report.step(*unreported.pop(0))
                if saving:
                    save()
                evaluated = evaluating and not stopping and measure()
                if evaluating and not evaluated and not saving:
                    save()
                if stopping or evaluating and not evaluated:
                    break
                if saving or evaluating:
                    report.start_clock()  # neither is training
            checkpoints.wait()

    # ---- What it came to, and what comes next.
    if step < steps or not evaluated:
        if jax.process_index() == 0:  # which speaks for all
            print(f"{stop.name}: stopped after step {step} of {steps}, which is saved. To continue: {run.command}", flush=True)
        return stop.exit_code
    return summary.finish(run.name, config, workdir, report.speed(), code)


if __name__ == "__main__":
    cli.start(main, folder.WORKDIR)
