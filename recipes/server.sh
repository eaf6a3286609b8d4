# Sourced by recipes: SERVER, the URL of a server of MODEL. One that is not given is started here, and ends with us.
: "${PORT:=8000}"
# --generation-config vllm: else it samples by the folder's own top_k and top_p, which is not the policy that is trained.
: "${SERVE:=vllm serve $MODEL --port $PORT --gpu-memory-utilization 0.25 --generation-config vllm}"
if [ -z "${SERVER:-}" ]; then
    SERVER="http://127.0.0.1:$PORT/v1#$MODEL"
    $SERVE >"$OUT/server.log" 2>&1 & server=$!
    trap 'kill $server 2>/dev/null; wait $server || true' EXIT
    until curl --silent --fail --output /dev/null "http://127.0.0.1:$PORT/v1/models"; do
        kill -0 $server 2>/dev/null || { echo "the server ended: see $OUT/server.log" >&2; exit 1; }
        sleep 1
    done
fi
