"""Text from models: a table with prompts becomes a table with responses, whoever runs the model.

Both ``sample.generate(table, model, params, tokenizer, ...)`` (here, on our devices) and
``serve.generate(table, server, ...)`` (an OpenAI-compatible server) follow one contract:

``generate(table, ..., tokens=, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, samples=1,
stop=(), key=) -> Table`` reads the column ``prompt`` (text, or one list of token ids per row) and
returns every row ``samples`` times (row 0 sample 0, row 0 sample 1, ..., row 1 sample 0, ...) with
the host columns ``response`` (text, object; without the stop string), ``finish`` (text: "stop" or
"length"), ``sample`` (int, 0 .. samples-1), ``response_ids`` (object: int32 array per row) and
``response_logps`` (object: float32 array per row, nats, natural log of the model's untempered
probability of each returned token); a server that does not tell ids or log-probabilities leaves
the last two columns out. ``stop`` is a tuple of strings; ``temperature`` 0 is greedy; ``top_k`` 0,
``top_p`` 1 and ``min_p`` 0 keep every token; ``key`` is a typed key here and an int seed there.
"""
