#!/bin/sh
# Builds, gates, compares and releases models with phiconv, on any CI system. See docs/ci.md.
#
#   pipeline.sh build     build the recipes and judge them by their gates       -> dist/NAME/
#   pipeline.sh compare   compare every build with the last release             -> reports/compared/
#   pipeline.sh collect   put the reports together       -> reports/report.md, reports/junit/NAME.xml
#   pipeline.sh release   with TAG: release the builds, verify and push them    -> release/
#   pipeline.sh all       all of these in turn; what fails is still compared and collected, but not
#                         released
#
# Settings, from the environment:
#   RECIPES     recipe files, separated by spaces [recipes/*.yaml]
#   MODEL       model to build from instead of the recipes'
#   LOCKED      1: build nothing but what `phiconv lock` wrote down
#   BASELINE    the last release, its reports, or the dist folder of an earlier run [baseline]
#   TAG         what is released; empty: nothing is
#   ALLOW       gates that need not have been run, such as: not-run:cuda not-run:dml
#   BASE_MODEL  Hub id of the source model, where MODEL is a folder
#   HUB_REPO    ORG/NAME on the Hugging Face Hub to push the release to; empty: none
#   PUSH        more options of `phiconv push`, such as: --create --private --delete-others
#   PHICONV     how to call phiconv [phiconv]
#
# The exit code is phiconv's: 0 done, 2 usage or recipe, 3 a stage or a file failed, 4 a gate failed
# or a build is worse than the last release, 5 the machine lacks something. Of several 3 goes before
# 5 before 4. dist/, reports/ and release/ are made in the current folder.
set -eu

RECIPES=${RECIPES:-recipes/*.yaml}
BASELINE=${BASELINE:-baseline}
PHICONV=${PHICONV:-phiconv}

# The exit code that stands for two. (All variables of a POSIX shell are global.)
worse() {
  for decisive in 3 5 4; do
    if [ "$1" -eq "$decisive" ] || [ "$2" -eq "$decisive" ]; then
      echo "$decisive"
      return
    fi
  done
  if [ "$1" -ne 0 ]; then echo "$1"; else echo "$2"; fi
}

build() {
  # RECIPES and PHICONV are lists of words.
  # shellcheck disable=SC2086
  $PHICONV build $RECIPES ${MODEL:+--model "$MODEL"} ${LOCKED:+--locked}
}

# Where the last release has the report of a build.
baseline_of() {
  for place in "$BASELINE/reports/$1" "$BASELINE/$1/report" "$BASELINE/$1"; do
    if [ -f "$place/report.json" ]; then
      echo "$place"
      return
    fi
  done
}

compare() {
  regressed=0
  mkdir -p reports/compared
  for report in dist/*/report/report.json; do
    [ -f "$report" ] || continue
    output=${report%/report/report.json}
    name=${output#dist/}
    last=$(baseline_of "$name")
    if [ -z "$last" ]; then
      echo "$name: not in $BASELINE, nothing to compare with" | tee "reports/compared/$name.txt"
      continue
    fi
    code=0
    $PHICONV compare "$last" "$output" >"reports/compared/$name.txt" || code=$?
    cat "reports/compared/$name.txt"
    regressed=$(worse "$regressed" "$code")
  done
  return "$regressed"
}

collect() {
  mkdir -p reports/junit
  : >reports/report.md
  for report in dist/*/report/report.md; do
    [ -f "$report" ] || continue
    folder=${report%/report.md}
    name=${folder#dist/}
    name=${name%/report}
    {
      cat "$report"
      if [ -f "reports/compared/$name.txt" ]; then
        printf '\n<details><summary>Compared with the last release</summary>\n\n```text\n'
        cat "reports/compared/$name.txt"
        printf '```\n\n</details>\n'
      fi
      printf '\n'
    } >>reports/report.md
    cp "$folder/junit.xml" "reports/junit/$name.xml"
    cp "$folder/report.html" "reports/$name.html"
  done
}

release() {
  if [ -z "${TAG:-}" ]; then
    echo "no TAG: nothing is released"
    return 0
  fi
  allowed=
  for exception in ${ALLOW:-}; do
    allowed="$allowed --allow $exception"
  done
  # allowed, PUSH and PHICONV are lists of words.
  # shellcheck disable=SC2086
  $PHICONV release dist/*/ --to release $allowed ${BASE_MODEL:+--base-model "$BASE_MODEL"} ||
    return $?
  $PHICONV verify release || return $?
  if [ -n "${HUB_REPO:-}" ]; then
    # shellcheck disable=SC2086
    $PHICONV push release --repo "$HUB_REPO" --message "$TAG" ${PUSH:-} || return $?
  fi
}

all() {
  status=0
  build || status=$?
  if [ "$status" -eq 2 ]; then
    return 2
  fi
  found=0
  compare || found=$?
  status=$(worse "$status" "$found")
  collect
  if [ "$status" -ne 0 ]; then
    echo "exit code $status: nothing is released" >&2
    return "$status"
  fi
  release
}

case "${1:-}" in
build | compare | collect | release | all) "$1" ;;
*)
  echo "usage: pipeline.sh build | compare | collect | release | all" >&2
  exit 2
  ;;
esac
