// Installs cml-runner, and launches: `cml-runner launch` writes the outputs and the summary itself.
"use strict";

const { appendFileSync } = require("node:fs");
const { join } = require("node:path");
const { program, run } = require("./program.cjs");

const PREFIX = "INPUT_";

// An input is the variable of the option of its name, which the program knows by itself.
function options(environment) {
  const found = { ...environment };
  for (const [name, value] of Object.entries(environment)) {
    if (!name.startsWith(PREFIX)) continue;
    delete found[name];
    if (value) found["CML_RUNNER_" + name.slice(PREFIX.length).replaceAll("-", "_")] = value;
  }
  return found;
}

async function main() {
  const cloud = process.env.INPUT_CLOUD;
  if (!cloud) {
    // The job's own machine would become the runner.
    console.log("::error::the input cloud is missing");
    return 2;
  }
  appendFileSync(process.env.GITHUB_STATE, `cloud=${cloud}\n`);
  const install = join(__dirname, "..", "setup", "install.sh");
  const code = await run("bash", [install], { ...process.env, CLOUDS: cloud });
  // If the job is cancelled, so is the launch, which deletes all that it has made.
  return code || run(program(), ["launch"], options(process.env));
}

main().then((code) => {
  process.exitCode = code;
});
