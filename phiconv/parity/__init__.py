"""Whether an artifact reads, writes and stops as its checkpoint does, before any weight is used.

Three checks: the tokenizer (`tokenizer`), the chat template (`chat_template`) and genai_config.json
with the files beside it (`genai_config`). `check_artifact` makes all of them.
"""
