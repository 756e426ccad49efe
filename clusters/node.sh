# Read by every shell on a node of a cluster (the first line of ~/.bashrc): which Python, which Ray, with a token.
export PATH="$HOME/simla_ray/.venv/bin:$PATH"
export RAY_AUTH_MODE=token # the token itself is in ~/.ray/auth_token
export RAY_ADDRESS=auto    # a driver joins the cluster of its node, and does not start a Ray of its own
export RAY_USAGE_STATS_ENABLED=0
# `ray exec` and `ray attach` open an interactive shell at home: there, `python experiments/pretrain.py` means ours.
case $- in *i*) [ "$PWD" != "$HOME" ] || cd "$HOME/simla_ray" ;; esac
