"""`vllm-steer doctor`: checks before a server starts, and of a running one."""
