"""Models from and to hubs: modelers.cn through openmind-hub, Hugging Face through huggingface-hub.

The clients run in a worker process (`worker.py`): openmind-hub's pins clash with vLLM's, and a token reaches a
client on the worker's standard input only. A client lists a repository and moves bytes; everything else is qtool's:
which requests may leave (`guard.py`), what is refused (`names.py`), what is wanted (`selection.py`), where bytes go
(`storage.py`, `sink.py`), when to try again (`patience.py`), and whether they are right (`transfer.py`, `publish.py`,
`lock.py`). A hub is not trusted with any of it. `download.py` and `upload.py` are the parent's side.
"""
