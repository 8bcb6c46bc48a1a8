# Sourced by scripts that run one long command after another. Bash alone would leave a command behind when it is killed.
#
# foreground COMMAND …   runs it, hands SIGTERM, SIGINT and SIGHUP on to it as SIGTERM, waits until it has saved and left,
#                        and returns its status.
foreground() {
    local child status
    "$@" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
    while true; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break  # a signal ends the wait, not the command
    done
    trap - TERM INT HUP
    return "$status"
}
