// How the steps of this action run programs.
"use strict";

const { spawn } = require("node:child_process");
const { join } = require("node:path");

const SIGNALS = ["SIGINT", "SIGTERM"];

function program() {
  return join(process.env.RUNNER_TEMP, "cml-runner", "bin", "cml-runner");
}

// Returns the exit code. A job that is cancelled tells us alone, so we tell the program, and wait
// for its end, however often we are told.
function run(command, words, env, stdio = "inherit") {
  return new Promise((resolve) => {
    const child = spawn(command, words, { env, stdio });
    const tell = (signal) => child.kill(signal);
    for (const one of SIGNALS) process.on(one, tell);
    child.on("error", (error) => {
      console.log(`::error::${command}: ${error.message}`);
      resolve(1);
    });
    child.on("close", (code, signal) => {
      for (const one of SIGNALS) process.removeListener(one, tell);
      resolve(signal ? 1 : code);
    });
  });
}

module.exports = { program, run };
