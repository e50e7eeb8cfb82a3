"""A real SGLang scheduler in this process, with its model runner, pools and radix cache, on the CPU.

    .venv-sglang/bin/python tests/sglang_scheduler.py JOB.json ANSWERS.json

JOB.json holds `server`, arguments of SGLang's ServerArgs, and `requests`: each with its `prompt`
(token numbers), how many tokens it wants (`length`), the turn of the scheduler at which it comes
(`turn`), its `rid`, and the number of tokens after which it is cancelled (`cancel`, or null).
ANSWERS.json gets the tokens of every request, what the scheduler did, and what the rings counted.
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
    made: dict[int, Any] = {}
    cancelled: set[int] = set()
    number, most, modes = 0, 0, set()
    while True:
        for index, request in enumerate(requests):
            if index not in made and request["turn"] <= number:
                made[index] = submit(scheduler, request)
            after = request["cancel"]
            if index in made and index not in cancelled and after is not None:
                if len(made[index].output_ids) >= after:
                    cancelled.add(index)
                    cancel(scheduler, request["rid"])
        busy = turn(scheduler)
        if scheduler.last_batch:
            modes.add(scheduler.last_batch.forward_mode.name)
        most = max(most, len(scheduler.running_batch.reqs))
        number += 1
        if not busy and len(made) == len(requests):
            break
        assert number < 5000, "the requests do not come to an end"
    pools = {made[index].rid: made[index].retraction_count for index in made}
    return {
        "tokens": [list(made[index].output_ids) for index in range(len(requests))],
        "cached": [made[index].cached_tokens for index in range(len(requests))],
        "retracted": sum(pools.values()),
        "most_running": most,
        "modes": sorted(modes),
    }


def rings(scheduler: Any) -> dict[str, Any]:
    """What the rings have counted, of a server with the backend `mac`."""
    from mac_attn import ReuseStats

    backend = scheduler.tp_worker.model_runner.attn_backend
    mac = getattr(getattr(backend, "decode_backend", None), "mac", None)
    if mac is None:
        return {}
    served = mac.engine.layers
    stats = [
        ReuseStats(one.ring.counters, one.ring.num_qo_heads, one.ring.num_kv_heads)
        for one in served.values()
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
    answers = serve(scheduler, job["requests"])
    answers["rings"] = rings(scheduler)
    Path(sys.argv[2]).write_text(json.dumps(answers))
    sys.stdout.flush()
    os._exit(0)  # its threads have no end of their own


if __name__ == "__main__":
    main()
