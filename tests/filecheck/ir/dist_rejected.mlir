// RUN: not furiosa-llm opt %s --split-input-file 2>&1 | filecheck %s

// Ranks need a mesh.
builtin.module {
func.func @forward(%x: tensor<5xf32>) {
  %0 = dist.shard %x cut <0, 3, [[0:3], [3:5]]> : tensor<5xf32> -> tensor<3xf32> loc("mlp"("n"))
  func.return
}
}
// CHECK:      error[SHD001]: the module does not say how many ranks run it
// CHECK-NEXT: at: dist.shard in @forward, mlp (n)

// -----

// A cut over other ranks than the mesh's.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xf32>) {
  %0 = dist.all_gather %x cut <0, 5, [[0:5], [5:9], [-], [-]]> : tensor<5xf32> -> tensor<9xf32>
  func.return
}
}
// CHECK:      error[SHD002]: a collective does not fit the mesh
// CHECK-NEXT: at: dist.all_gather in @forward
// CHECK-NEXT: cause: it is cut over 4 ranks, but the module's mesh has 2

// -----

// A sum over ranks that there are not.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xf32>) {
  %0 = dist.all_reduce %x mask 3 : tensor<5xf32> -> tensor<5xf32>
  func.return
}
}
// CHECK:      error[SHD002]
// CHECK:      cause: it sums over ranks that differ in the bits of 3, but the module's mesh has 2

// -----

// A send without a recv.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 2>} {
func.func @forward(%x: tensor<5xf32>) {
  dist.send %x to 1 : tensor<5xf32> loc("model.layers.1"("s"))
  func.return
}
}
// CHECK:      error[SHD003]: an exchange between stages has no partner
// CHECK-NEXT: at: dist.send in @forward, model.layers.1 (s)
// CHECK-NEXT: cause: stage 1 has no dist.recv for it

// -----

// A recv without a send.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 2>} {
func.func @forward(%x: tensor<5xf32>) {
  %0 = dist.recv from 0 : tensor<5xf32>
  func.return
}
}
// CHECK:      error[SHD003]
// CHECK-NEXT: at: dist.recv in @forward
// CHECK-NEXT: cause: stage 0 sends it nothing that has not been received

// -----

// Both sides are named when they exchange different things.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 2>} {
func.func @forward(%x: tensor<5xf32>) {
  dist.send %x to 1 : tensor<5xf32> loc("model.layers.1"("s"))
  %0 = dist.recv from 0 : tensor<4xf32> loc("model.layers.2"("r"))
  func.return
}
}
// CHECK:      error[SHD003]
// CHECK-NEXT: at: dist.recv in @forward, model.layers.2 (r)
// CHECK-NEXT: cause: it takes tensor<4xf32>, but dist.send in @forward, model.layers.1 (s) sends tensor<5xf32>

// -----

// Stages send to their neighbours.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 2>} {
func.func @forward(%x: tensor<5xf32>) {
  dist.send %x to 2 : tensor<5xf32>
  func.return
}
}
// CHECK:      cause: stage 0 sends to stage 1 alone

// -----

// A third stage begins, but the second still owes a recv.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 2>} {
func.func @forward(%x: tensor<5xf32>) {
  dist.send %x to 1 : tensor<5xf32>
  dist.send %x to 1 : tensor<5xf32>
  %0 = dist.recv from 0 : tensor<5xf32>
  dist.send %0 to 2 : tensor<5xf32>
  func.return
}
}
// CHECK:      cause: stage 1 has no dist.recv for it

// -----

// Blocks do not exchange values themselves.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 2>} {
func.func private @block(%x: tensor<5xf32>) {
  dist.send %x to 1 : tensor<5xf32>
  func.return
}
}
// CHECK:      at: dist.send in @block
// CHECK-NEXT: cause: stages exchange values in @forward alone, between its calls

// -----

// A value that stays on its stage.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 2>} {
func.func @forward(%x: tensor<5xf32>) {
  %0 = nn.neg %x : tensor<5xf32> loc("a"("n"))
  dist.send %x to 1 : tensor<5xf32>
  %1 = dist.recv from 0 : tensor<5xf32>
  %2 = nn.add %1, %0 : tensor<5xf32>, tensor<5xf32> -> tensor<5xf32> loc("b"("m"))
  func.return
}
}
// CHECK:      error[SHD004]: stage 1 uses a value that stage 0 has
// CHECK-NEXT: at: nn.add in @forward, b (m)
// CHECK-NEXT: cause: nn.neg in @forward, a (n) computes it on stage 0

// -----

// The mesh has more stages than @forward.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 2>} {
func.func @forward(%x: tensor<5xf32>) {
  %0 = nn.neg %x : tensor<5xf32>
  func.return
}
}
// CHECK:      error[SHD005]: @forward has 1 stages, the mesh 2

// -----

// A parameter's part is of the parameter.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
nn.parameter @w : tensor<6xf32>
func.func @forward(%x: tensor<5xf32>) {
  %0 = dist.get_shard @w cut <0, 3, [[0:3], [3:5]]> : tensor<3xf32>
  func.return
}
}
// CHECK:      error[IRV005]: @w is used with another type than it is declared with
// CHECK:      cause: used as tensor<5xf32>, declared as tensor<6xf32>

// -----

// Each rank of a table has a row of zeros.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xi32>) {
  %0 = dist.local_rows %x cut <0, 3, [[0:3], [3:5]]> : tensor<5xi32> -> tensor<5xi32>
  func.return
}
}
// CHECK:      cause: the parts of ranks [0] have no row of zeros

// -----

// The table is cut by rows.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xi32>) {
  %0 = dist.local_rows %x cut <1, 4, [[0:3], [3:5]]> : tensor<5xi32> -> tensor<5xi32>
  func.return
}
}
// CHECK:      cause: the table is cut by rows, and each row is on one rank

// -----

// There are three algorithms.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xf32>) {
  %0 = dist.all_reduce %x mask 1 algorithm "tree" : tensor<5xf32> -> tensor<5xf32>
  func.return
}
}
// CHECK:      cause: algorithm is one of rotate, scatter_gather, switch, not tree

// -----

// A sum over nobody.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xf32>) {
  %0 = dist.all_reduce %x mask 0 : tensor<5xf32> -> tensor<5xf32>
  func.return
}
}
// CHECK:      cause: mask names at least one bit, but it is 0

// -----

// Part and whole fit the cut.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xf32>) {
  %0 = dist.all_gather %x cut <0, 3, [[0:3], [3:5]]> : tensor<5xf32> -> tensor<5xf32>
  func.return
}
}
// CHECK:      cause: [5] has no dimension 0 of 3 elements, which is each rank's part of the cut

// -----

// Cuts of @forward fit its types.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xf32>) attributes {"dist.argument_cuts" = [#dist.cut<0, 3, [[0:3], [3:5]]>]} {
  func.return
}
}
// CHECK:      cause: dist.argument_cuts[0]: [5] has no dimension 0 of 3 elements, which is each rank's part of the cut

// -----

// There is one entry for each argument.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xf32>) attributes {"dist.argument_cuts" = []} {
  func.return
}
}
// CHECK:      cause: dist.argument_cuts must be an array of 1 cuts or units

// -----

// An entry is a cut or unit.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xf32>) attributes {"dist.argument_cuts" = ["all"]} {
  func.return
}
}
// CHECK:      cause: dist.argument_cuts[0]: "all" is neither a cut nor unit

// -----

// Tensor parallelism is over 1, 2, 4 or 8 ranks.
builtin.module attributes {"dist.mesh" = #dist.mesh<3, 1>} {
func.func @forward(%x: tensor<5xf32>) {
  %0 = nn.neg %x : tensor<5xf32>
  func.return
}
}
// CHECK:      error[IRV008]
// CHECK:      cause: a mesh has one of 1, 2, 4, 8 ranks, not 3

// -----

// A partial product is f32 or of its operands' type.
builtin.module {
func.func @forward(%x: tensor<2x4xbf16>, %w: tensor<3x4xbf16>) {
  %0 = nn.linear %x, %w : tensor<2x4xbf16>, tensor<3x4xbf16> -> tensor<2x3xf16>
  func.return
}
}
// CHECK:      cause: result is tensor<2x3xf16> but the operands give tensor<2x3xbf16>

// -----

// Ranks add up or take the largest.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xf32>) {
  %0 = dist.all_reduce %x mask 1 kind "min" : tensor<5xf32> -> tensor<5xf32>
  func.return
}
}
// CHECK:      cause: kind is max or left out, not min
