"""Running code that nobody has read: a pool of sandboxes for one machine, and the same as a service over HTTP.

    python -m kimi_jax.rewards.sandbox --port=8123

`LocalSandbox` (pool.py) and `SandboxClient` (client.py) have the interface `api.Sandbox`. What stands between a program
and the machine is in zygote.py, inside.py and seccomp.py; docs/sandbox.md says what that protects against.
"""
