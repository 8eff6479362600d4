// RUN: furiosa-llm opt %s --passes "lower-collectives" --split-input-file | filecheck %s

// In each cluster through the ring of switches, then between the two; rounded at the end.
builtin.module attributes {"dist.mesh" = #dist.mesh<8, 1>} {
func.func @forward(%x: tensor<1x64xf32>) -> tensor<1x64xbf16> {
  %y = dist.all_reduce %x mask 7 : tensor<1x64xf32> -> tensor<1x64xbf16> loc("mlp.down"("n"))
  func.return %y : tensor<1x64xbf16>
}
}
// CHECK:      [[A:%.*]] = dist.all_reduce %x mask 3 algorithm "switch" : tensor<1x64xf32> -> tensor<1x64xf32> loc("mlp.down"("n"))
// CHECK-NEXT: [[B:%.*]] = dist.all_reduce [[A]] mask 4 algorithm "rotate" : tensor<1x64xf32> -> tensor<1x64xbf16> loc("mlp.down"("n"))
// CHECK-NEXT: func.return [[B]]

// -----

// What was gathered only to be cut again stays where it is; what all had is not collected.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<3xf32>, %w: tensor<5xf32>) -> (tensor<3xf32>, tensor<5xf32>) {
  %0 = dist.all_gather %x cut <0, 3, [[0:3], [3:5]]> : tensor<3xf32> -> tensor<5xf32>
  %1 = dist.shard %0 cut <0, 3, [[0:3], [3:5]]> : tensor<5xf32> -> tensor<3xf32>
  %2 = dist.shard %w cut <0, 3, [[0:3], [3:5]]> : tensor<5xf32> -> tensor<3xf32>
  %3 = dist.all_gather %2 cut <0, 3, [[0:3], [3:5]]> : tensor<3xf32> -> tensor<5xf32>
  func.return %1, %3 : tensor<3xf32>, tensor<5xf32>
}
}
// CHECK:      func.func @forward
// CHECK-NEXT:   func.return %x, %w

// -----

// A sum of which each rank needs a part; a sum that is done twice; one that nobody needs.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xf32>, %y: tensor<5xf32>) -> (tensor<3xbf16>, tensor<5xf32>, tensor<5xf32>) {
  %0 = dist.all_reduce %x mask 1 : tensor<5xf32> -> tensor<5xbf16>
  %1 = dist.shard %0 cut <0, 3, [[0:3], [3:5]]> : tensor<5xbf16> -> tensor<3xbf16>
  %2 = dist.all_reduce %y mask 1 : tensor<5xf32> -> tensor<5xf32>
  %3 = dist.all_reduce %y mask 1 : tensor<5xf32> -> tensor<5xf32>
  %4 = dist.all_reduce %y mask 1 : tensor<5xf32> -> tensor<5xbf16>
  func.return %1, %2, %3 : tensor<3xbf16>, tensor<5xf32>, tensor<5xf32>
}
}
// CHECK:      func.func @forward
// CHECK-NEXT:   [[PART:%.*]] = dist.reduce_scatter %x cut <0, 3, {{\[\[}}0:3], [3:5]]> algorithm "scatter_gather" : tensor<5xf32> -> tensor<3xbf16>
// CHECK-NEXT:   [[SUM:%.*]] = dist.all_reduce %y mask 1 algorithm
// CHECK-NEXT:   func.return [[PART]], [[SUM]], [[SUM]]

// -----

// The sum of two sums is one.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
func.func @forward(%x: tensor<5xf32>, %y: tensor<5xf32>) -> tensor<5xbf16> {
  %0 = dist.all_reduce %x mask 1 : tensor<5xf32> -> tensor<5xbf16>
  %1 = dist.all_reduce %y mask 1 : tensor<5xf32> -> tensor<5xbf16>
  %2 = nn.add %0, %1 : tensor<5xbf16>, tensor<5xbf16> -> tensor<5xbf16>
  func.return %2 : tensor<5xbf16>
}
}
// CHECK:      [[ADDED:%.*]] = nn.add %x, %y : tensor<5xf32>, tensor<5xf32> -> tensor<5xf32>
// CHECK-NEXT: [[SUM:%.*]] = dist.all_reduce [[ADDED]] mask 1 algorithm {{.*}} : tensor<5xf32> -> tensor<5xbf16>
// CHECK-NEXT: func.return [[SUM]]

// -----

// A sum over some of the ranks is not scattered over all.
builtin.module attributes {"dist.mesh" = #dist.mesh<4, 1>} {
func.func @forward(%x: tensor<4xf32>) -> tensor<1xf32> {
  %0 = dist.all_reduce %x mask 1 : tensor<4xf32> -> tensor<4xf32>
  %1 = dist.shard %0 cut <0, 1, [[0:1], [1:2], [2:3], [3:4]]> : tensor<4xf32> -> tensor<1xf32>
  func.return %1 : tensor<1xf32>
}
}
// CHECK:      [[SUM:%.*]] = dist.all_reduce %x mask 1 algorithm
// CHECK-NEXT: [[PART:%.*]] = dist.shard [[SUM]]
// CHECK-NEXT: func.return [[PART]]

// -----

// The largest of all ranks goes the cheapest way, too; but largest values are not added up before
// they are known, and whoever needs a part of them gets it from the whole.
builtin.module attributes {"dist.mesh" = #dist.mesh<8, 1>} {
func.func @forward(%x: tensor<1x64xf32>, %y: tensor<1x64xf32>) -> (tensor<1x64xf32>, tensor<1x8xf32>) {
  %0 = dist.all_reduce %x mask 7 kind "max" : tensor<1x64xf32> -> tensor<1x64xf32>
  %1 = dist.all_reduce %y mask 7 kind "max" : tensor<1x64xf32> -> tensor<1x64xf32>
  %2 = nn.add %0, %1 : tensor<1x64xf32>, tensor<1x64xf32> -> tensor<1x64xf32>
  %3 = dist.all_reduce %2 mask 7 kind "max" : tensor<1x64xf32> -> tensor<1x64xf32>
  %4 = dist.shard %3 cut <1, 8, [[0:8], [8:16], [16:24], [24:32], [32:40], [40:48], [48:56], [56:64]]> : tensor<1x64xf32> -> tensor<1x8xf32>
  func.return %2, %4 : tensor<1x64xf32>, tensor<1x8xf32>
}
}
// CHECK:      [[A:%.*]] = dist.all_reduce %x mask 3 kind "max" algorithm "switch"
// CHECK-NEXT: [[X:%.*]] = dist.all_reduce [[A]] mask 4 kind "max" algorithm "rotate"
// CHECK:      [[Y:%.*]] = dist.all_reduce {{.*}} mask 4 kind "max" algorithm "rotate"
// CHECK-NEXT: [[SUM:%.*]] = nn.add [[X]], [[Y]]
// CHECK:      dist.shard {{.*}} -> tensor<1x8xf32>
