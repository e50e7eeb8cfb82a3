# One step of the Makefile: a line that says what is done and how long it took. All that the command prints goes into
# build/log/NAME.log, whose end is shown if it fails; why something was skipped is shown always.
#   sh build_support/step.sh NAME "what is done" COMMAND [ARGUMENT...]
name=$1 what=$2 log=build/log/$1.log
shift 2
mkdir -p build/log
printf '%s ... ' "$what"
start=$(date +%s)
"$@" > "$log" 2>&1 < /dev/null
status=$?
seconds=$(($(date +%s) - start))
if [ $status -ne 0 ]; then
  printf 'failed after %d s, the end of %s:\n\n' $seconds "$log"
  tail -n 200 "$log"
  printf '\n%s: failed (status %d), all of it is in %s\n' "$name" $status "$log"
  exit $status
fi
printf '%d s\n' $seconds
grep '^make [a-z-]*: skipped' "$log" || true
