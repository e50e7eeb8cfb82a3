"""A real SGLang scheduler in one process: model runner, pools and radix cache, on the CPU.

    .venv-sglang/bin/python tests/sglang_scheduler.py JOB.json ANSWERS.json

JOB.json holds `server`, arguments of SGLang's ServerArgs; `rounds`, lists of requests that are run
one list after the other; and `graphs`, whether steps of decode are graphs (sglang_tape.py). Of a
request there are its `rid`, its `prompt` (token numbers), how many tokens it wants (`length`), the
turn of the scheduler at which it comes (`turn`), and after how many tokens it is cancelled
(`cancel`, or null). `one_number` spoils the rings: every request has the same number in them.
ANSWERS.json gets the tokens of every request and what was seen of the scheduler and of the rings.
SGLang holds its configuration for a whole process, hence one for every job.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from pathlib import Path
from typing import Any


def start(arguments: dict[str, Any]) -> Any:
    """The scheduler of a server with these arguments."""
    from sglang.srt.plugins import load_plugins

    load_plugins()  # as the server does, before it looks at its arguments
    from sglang.srt.managers.scheduler import Scheduler, configure_scheduler_process
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    args = ServerArgs(**arguments)
    ports = PortArgs.init_new(args)
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    configure_scheduler_process(args, 0)
    return Scheduler(args, ports)


def submit(scheduler: Any, request: dict[str, Any]) -> Any:
    """Send a request; the scheduler's own object of it."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(
        max_new_tokens=request["length"], temperature=0, ignore_eos=True, top_p=1.0
    )
    params.normalize(None)
    sent = TokenizedGenerateReqInput(
        rid=request["rid"],
        input_text=None,
        input_ids=array("q", request["prompt"]),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=params,
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )
    scheduler.process_input_requests([sent])
    return scheduler.waiting_queue[-1]


def cancel(scheduler: Any, rid: str) -> None:
    """Abort a request, as its client going away does."""
    from sglang.srt.managers.io_struct import AbortReq

    scheduler.process_input_requests([AbortReq(rid=rid)])


def turn(scheduler: Any) -> bool:
    """One turn of `Scheduler.event_loop_normal`; whether there was anything to run."""
    plan = scheduler.get_next_batch_to_run(
        running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
    )
    scheduler.running_batch = plan.running_batch
    batch = plan.batch_to_run
    if batch:
        scheduler.process_batch_result(batch, scheduler.run_batch(batch))
    scheduler.last_batch = batch
    return bool(batch)


def serve(scheduler: Any, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Run requests to their end; their tokens and what was seen on the way."""
    made: list[Any] = []
    cancelled: set[str] = set()
    most_running, mixed, number, busy = 0, 0, 0, True
    while busy or len(made) < len(requests):
        assert number < 5000, "the requests do not come to an end"
        coming = requests[len(made) :]
        made += [submit(scheduler, request) for request in coming if request["turn"] <= number]
        for request, req in zip(requests, made, strict=False):
            after, rid = request["cancel"], request["rid"]
            if after is not None and rid not in cancelled and len(req.output_ids) >= after:
                cancelled.add(rid)
                cancel(scheduler, rid)
        busy = turn(scheduler)
        if scheduler.last_batch:
            mixed += scheduler.last_batch.forward_mode.is_mixed()
        most_running = max(most_running, len(scheduler.running_batch.reqs))
        number += 1
    return {
        "tokens": [list(req.output_ids) for req in made],
        "cached": sum(req.cached_tokens for req in made),
        "retracted": sum(req.retraction_count for req in made),
        "most_running": most_running,
        "mixed": mixed,
    }


def rings(scheduler: Any) -> dict[str, Any]:
    """What the rings have counted, of a server with the backend `mac`."""
    from mac_attn import ReuseStats

    backend = scheduler.tp_worker.model_runner.attn_backend
    mac = getattr(getattr(backend, "decode_backend", None), "mac", None)
    if mac is None:
        return {}
    served = mac.engine.rings
    stats = [
        ReuseStats(one.counters, one.num_qo_heads, one.num_kv_heads) for one in served.values()
    ]
    return {
        "layers": len(served),
        "steps": sum(one.steps for one in stats),
        "hits": sum(one.kv_head_hits for one in stats),
        "read_share": sum(one.kv_tokens_read for one in stats)
        / max(1, sum(one.kv_tokens_full for one in stats)),
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    scheduler = start(job["server"])
    if job["one_number"]:
        from mac_attn.integrations.serving.slots import SlotTable

        SlotTable._next_number = lambda self: 1  # type: ignore[method-assign]
    tapes = None
    if job["graphs"]:
        from sglang_tape import record

        tapes = record(scheduler.tp_worker.model_runner)
    answers: dict[str, Any] = {"rounds": [serve(scheduler, one) for one in job["rounds"]]}
    answers["replays"] = 0 if tapes is None else tapes.replays
    answers["rings"] = rings(scheduler)
    Path(sys.argv[2]).write_text(json.dumps(answers))
    sys.stdout.flush()
    os._exit(0)  # its threads have no end of their own


if __name__ == "__main__":
    main()
