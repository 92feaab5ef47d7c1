#!/bin/sh
# Serve with ENTMAXKV: takes what `vllm serve` takes. Another backend is used only if these
# arguments name it; a --config file cannot.
set -eu

for argument in "$@"; do
    case $argument in
        --attention-backend* | --attention_backend* | --attention-config* | -ac*) exec vllm serve "$@" ;;
    esac
done
exec vllm serve "$@" --attention-backend ENTMAXKV
